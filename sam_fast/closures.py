"""``step(closure)``: which passes a closure computes, and whether gradients that are there already are the first."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from .amp import check_unscaled
from .closure_stats import uncounted_forwards
from .devices import devices_of
from .gradients import all_zero, are_new, mark_used
from .options import check_flag
from .random_state import RandomState
from .running_stats import ExtraBuffers, Models, check_extra_buffers, check_models
from .step_state import StepState

AUTO, BOTH, SECOND = "auto", "both", "second"

TAKEN = (
    "step(closure) found gradients and takes them for the first pass, as the reference implementation does; the "
    'closure is the second. If that is right, say SAM(..., closure="second"). If they are left over from something '
    'else, or accumulated over several batches, say SAM(..., closure="both"): they are then discarded and the closure '
    "is called for both passes. step(closure, passes=...) does the same for one call."
)

NO_SECOND_GRADIENT = (
    "step(closure) took the gradients that were there for the first pass, and the closure computed none for the "
    "second, like a plain step() in Lightning's manual optimization: call first_step(zero_grad=True) after the first "
    "backward pass, then backward() again at w + e, then second_step()"
)

STEPS_ITSELF = (
    "the closure of step(closure) has begun or ended a step itself: it may compute the loss, call backward() and "
    "zero gradients, and leave first_step(), second_step(), step() and restore() to step(closure)"
)

LIGHTNING_CALLBACK = "Trainer(callbacks=[sam_fast.integrations.lightning.SAMCallback()])"

ACCUMULATED = (
    "Lightning has accumulated gradients over several batches before step(closure), and the closure computes the last "
    f"batch only: SAM cannot take its second gradient on the same data. Use {LIGHTNING_CALLBACK}, which keeps the "
    "batches for the second pass. If it is there: LearningRateFinder, BatchSizeFinder and Tuner train without "
    "callbacks, so let them run in a Trainer with accumulate_grad_batches=1"
)

ACCUMULATED_BY_ACCELERATE = (
    "Accelerate accumulates gradients over several batches (gradient_accumulation_steps) before step(closure), and the "
    "closure computes one of them: SAM cannot take its second gradient on the same data. Use Accelerator() without "
    "gradient_accumulation_steps, and sam_fast.TrainStep(..., micro_batches=, backward=accelerator.backward)"
)

LOGGED_TWICE = (
    "Lightning's automatic optimization calls training_step for both passes of SAM: the weights are right, but what it "
    f"logs is the mean of both, and metrics count batches twice. Use {LIGHTNING_CALLBACK}. If it is there: this is "
    "LearningRateFinder, BatchSizeFinder or Tuner, which train without callbacks"
)


class WholeStep:
    """A closure that makes both passes itself: it calls ``first_step`` and ends with the second gradients at ``w + e``.

    Integrations hand it to ``step`` where a framework wants a closure. It may leave ``first_step`` out in steps that do
    not perturb.
    """

    def __init__(self, closure: Callable[[], Any]) -> None:
        self.closure = closure

    def __call__(self) -> Any:
        return self.closure()


def check_closure_option(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` says which passes a closure computes."""
    if value not in (AUTO, BOTH, SECOND):
        raise ValueError(f'{name} must be "auto", "both" or "second", got {value!r}')


def closure_step(
    optimizer: Any,
    closure: Callable[[], Any],
    passes: str,
    replay_rng: bool,
    model: Models | None,
    extra_buffers: ExtraBuffers,
) -> Any:
    """A whole step of ``optimizer``, a SAM, with a closure; see :meth:`sam_fast.SAM.step`."""
    check_closure_option("passes", passes)
    check_flag("replay_rng", replay_rng)
    extra_buffers = (
        check_extra_buffers(extra_buffers) if model is None else check_models(model, extra_buffers, "step(model=)")[1]
    )
    if optimizer._step.found_inf is not None:
        raise RuntimeError(
            "GradScaler.step with a closure would not check the second gradient: use first_step() and "
            "scaler.step(optimizer)"
        )
    if isinstance(innermost(closure), WholeStep):
        return _whole_step(optimizer, closure)
    step = optimizer._step
    begun = step.active
    first_pass_done = begun or _takes_gradients(optimizer, closure, passes)
    if replay_rng and first_pass_done:
        raise ValueError(
            "step(closure, replay_rng=True) found gradients: their pass is the first, and its random state was not "
            "seen. Call zero_grad() to have the closure called twice, or use first_pass(model, replay_rng=True) and "
            "second_pass(model)"
        )
    if step.random_states and not first_pass_done:
        raise ValueError(
            "first_pass(replay_rng=True), but the closure is to be called for both passes: use step(closure, "
            "replay_rng=True)"
        )
    loss = None
    with _given_up_if_it_raises(optimizer):
        if first_pass_done and not begun:
            first_pass_done = _first_step_along_existing(optimizer, passes)
        computes_first = not first_pass_done and optimizer.needs_first_pass
        if first_pass_done:
            random_state = step.next_random_state()
        else:
            replays = replay_rng and computes_first
            random_state = RandomState.capture(devices_of(optimizer.param_groups)) if replays else None
            optimizer.zero_grad()
            if computes_first:
                loss = closure()
                _check_where_the_step_stands(step, active=False)
            optimizer.first_step(zero_grad=True)
        replayed = nullcontext() if random_state is None else random_state.replayed()
        uncounted = uncounted_forwards(model, extra_buffers, closure) if step.first_pass_done else nullcontext()
        active = step.active  # False where a variant has both steps of its own
        with uncounted, replayed:
            second_loss = closure()
        _check_where_the_step_stands(step, active)
        computed = begun or not first_pass_done or are_new(optimizer._gradients())
        if not computed and all_zero(optimizer._gradients()):  # if not zero, they were written through .data
            raise RuntimeError(NO_SECOND_GRADIENT)
    optimizer._end_step()
    mark_used(optimizer._gradients())
    return loss if computes_first else second_loss


@contextmanager
def _given_up_if_it_raises(optimizer: Any) -> Iterator[None]:
    """Around what a closure computes."""
    try:
        with torch.enable_grad():
            yield
    except BaseException:
        optimizer._give_up()
        mark_used(optimizer._gradients())  # they belong to a step that was given up
        raise


def _check_where_the_step_stands(step: StepState, active: bool) -> None:
    if step.active is not active:
        raise RuntimeError(STEPS_ITSELF)


def _whole_step(optimizer: Any, closure: Callable[[], Any]) -> Any:
    with _given_up_if_it_raises(optimizer):
        loss = closure()
    step_without_closure(optimizer, None, False)
    return loss


def step_without_closure(optimizer: Any, passes: str | None, replay_rng: bool) -> None:
    """A second step of ``optimizer``, a SAM; see :meth:`sam_fast.SAM.step`."""
    if replay_rng:
        raise ValueError(
            "step(replay_rng=True) needs a closure: without one use first_pass(model, replay_rng=True) and "
            "second_pass(model)"
        )
    if passes is not None:
        raise ValueError(f"step(passes={passes!r}) needs a closure")
    if not optimizer._step.active and _can_only_make_state(optimizer):
        optimizer.base_optimizer.step()
        return
    if optimizer._step.found_inf is not None and not optimizer._step.active and optimizer.will_perturb:
        raise RuntimeError(
            "a GradScaler has called step() without first_step() before it: there was only one pass. Use "
            "sam_fast.TrainStep(..., scaler=scaler), or call first_step() between two backward passes (timm's "
            "NativeScaler makes the first with need_update=False). In Lightning's automatic optimization under float16 "
            f"use {LIGHTNING_CALLBACK}"
        )
    optimizer._require_first_step("step() without a closure")
    if optimizer._step.found_inf is not None:
        check_unscaled(optimizer)
    optimizer._end_step()


def _can_only_make_state(optimizer: Any) -> bool:
    """Whether a step would do nothing but make the base optimizer's state: there is none yet, all learning rates
    and all gradients are 0.

    This is how torch.distributed.checkpoint makes an optimizer create its state before saving or loading it. A training
    loop that forgot first_step() has gradients that are not zero.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]  # None: a group without one
    if optimizer.state or not all(lr is not None and float(lr) == 0.0 for lr in rates):
        return False
    grads = list(optimizer._gradients())
    return bool(grads) and all_zero(grads)


def _takes_gradients(optimizer: Any, closure: Callable[[], Any], passes: str) -> bool:
    """Whether the existing gradients are to be the first pass, as far as can be told without reading their values."""
    if passes == SECOND:
        there_are_some = are_new(optimizer._gradients())
        if not there_are_some and optimizer.needs_first_pass:
            raise RuntimeError(
                'passes="second" takes the gradients that are there for the first pass, but there are no new ones: '
                "call backward() first"
            )
        return there_are_some
    by_lightning = lightning_closure(closure)
    if by_lightning is not None:
        if by_lightning._zero_grad_fn is None and are_new(optimizer._gradients()):
            raise RuntimeError(ACCUMULATED)
        if not optimizer._step.warned_of_gradients:
            optimizer._step.warned_of_gradients = True
            warnings.warn(LOGGED_TWICE, UserWarning, stacklevel=5)
        return False
    there_are_some = passes == AUTO and are_new(optimizer._gradients())
    if there_are_some and accelerate_accumulates():
        raise RuntimeError(ACCUMULATED_BY_ACCELERATE)
    return there_are_some


def accelerate_accumulates() -> bool:
    """Whether an Accelerator has ``gradient_accumulation_steps`` above 1; all Accelerators share one state."""
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    return bool(state is not None and state._shared_state.get("plugin_kwargs", {}).get("num_steps", 1) > 1)


def _first_step_along_existing(optimizer: Any, passes: str) -> bool:
    """Take first_step along the existing gradients.

    False if they are all zero: there was no first pass then, and a first_step is undone.
    """
    step = optimizer._step
    surely = passes == SECOND or step.first_pass_entered
    if not (surely or optimizer.needs_first_pass) and all_zero(optimizer._gradients()):
        return False
    optimizer.first_step(zero_grad=True)
    if surely:
        return True
    if step.perturbs and float(optimizer.grad_norm) == 0.0:
        optimizer._perturbation.restore()
        step.end()
        return False
    if not step.warned_of_gradients:
        step.warned_of_gradients = True
        warnings.warn(TAKEN, UserWarning, stacklevel=5)
    return True


def lightning_closure(closure: Callable[[], Any]) -> Any:
    """The closure of Lightning's automatic optimization that ``closure`` leads to, or None.

    It zeroes gradients itself, unless it adds to those of earlier batches: its ``_zero_grad_fn`` is then None.
    """
    closure = innermost(closure)
    return closure if hasattr(closure, "_zero_grad_fn") and hasattr(closure, "_step_fn") else None


def innermost(closure: Callable[[], Any]) -> Callable[[], Any]:
    """The closure inside the partial functions that Lightning, for one, puts around it."""
    while isinstance(closure, partial) and closure.args:
        closure = closure.args[-1]
    return closure
