"""What surrounds a forward and backward pass: random state, gradient synchronisation, BatchNorm statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .backends.columns import grad_of
from .batchnorm import frozen_running_stats
from .devices import devices_of
from .gradients import are_new
from .options import check_flag
from .random_state import RandomState
from .running_stats import ExtraBuffers, Models, as_models, check_models
from .schedule import Schedule, steps_taken
from .storage.fsdp import forget_gathered_weights, is_fsdp_module, own_gradients
from .wrapper import OptimizerWrapper


class Passes(OptimizerWrapper):
    """The two passes of a step as context managers, and properties that say where the step stands."""

    _schedule: Schedule | None
    first_step: Callable[[], None]  # methods of SAM
    restore: Callable[[], None]

    @property
    def will_perturb(self) -> bool:
        """Whether the step that is under way, or else the next one, perturbs. This depends on the schedule and the step
        counter alone, so it is the same on all ranks.
        """
        return self._schedule is None or self._schedule.perturbs(steps_taken(self._current_base().param_groups))

    @property
    def needs_first_pass(self) -> bool:
        """Whether the next step needs a first pass: it does if it perturbs."""
        return self.will_perturb

    @property
    def grad_norm(self) -> Tensor:
        """``||T g||`` of the last ``first_step`` that perturbed: a 0-d float64 tensor on the (first) parameters'
        device. Reading it does not wait for the device.

        Raises:
            RuntimeError: there was none yet.
        """
        if not self._perturbation.measured:
            raise RuntimeError(
                "grad_norm is known after the first first_step() that perturbs: with a schedule ask will_perturb"
            )
        return self._perturbation.norm.value.clone()

    @torch.no_grad()
    def _grad_norm(self) -> Tensor:
        """``||T g||`` of the gradients as they are now, in their dtype. The name is the reference implementation's:
        loops log the norm with it, and variants of SAM measure with it in a ``first_step`` of their own.
        """
        norm = torch.nn.utils.get_total_norm(
            (p.abs() + group["eta"]) * p.grad if group["adaptive"] else p.grad
            for group in self.param_groups
            for p in group["params"]
            if group["perturb"] and p.grad is not None
        )
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @property
    def second_step_path(self) -> str:
        """How the last second step was taken: "fused", restore and step in one pass, or the reason why the base
        optimizer stepped by itself.
        """
        return self._step.path

    def _give_up(self) -> None:
        """Clean up after a pass that has raised, also after a first pass, of which ``restore`` alone knows nothing."""
        self.restore()
        self._perturbation.storage.give_up_pass()

    def _gradients(self) -> Iterator[Tensor]:
        """All gradients; of a DTensor the local tensor, whose version counter FSDP2 moves when it accumulates."""
        return (
            grad if type(grad) is Tensor else getattr(grad, "_local_tensor", grad)
            for group in self.param_groups
            for grad in map(grad_of, group["params"])
            if grad is not None
        )

    def _common_norm(self) -> Tensor | None:
        """The norm of this step's first gradient if it is the same in all processes. None if each process has, or may
        have, a gradient of its own: without ``first_pass`` nothing tells whether the gradients were synchronised.
        """
        step, perturbation = self._step, self._perturbation
        common = step.first_pass_entered or perturbation.storage.process_wide or not several_processes()
        return perturbation.norm.value if step.perturbs and common and not step.own_gradient else None

    def _require_first_step(self, what: str) -> None:
        if not self._step.active and self.will_perturb:
            raise RuntimeError(
                f"{what} needs first_step() before it: call backward(), first_step(), backward() again, then "
                "second_step(). Where a framework owns the loop, see docs/integrations.md: SAMTrainerMixin, "
                "SAMCallback. A first_step of a class of your own has to call super().first_step()"
            )

    @contextmanager
    def first_pass(self, model: Models, replay_rng: bool = False, sync: bool = True) -> Iterator[None]:
        """Around the first forward and backward; optional.

        Inside, weights of groups with ``perturb=False`` get no gradient, which saves computing it. Models in DDP or
        FSDP2 are an exception: they wait for every gradient.

        Args:
            model: the model, as it is called (the DDP wrapper where there is one), or a list or tuple of models.
            replay_rng: remember the random state of the CPU, of the parameters' devices, of Python and of NumPy, for
                ``second_pass`` to start from, so that dropout and mixup draw the same in both passes. Both context
                managers may be entered once, or once for each micro-batch.
            sync: False to run this pass without gradient synchronisation (m-sharpness: each rank perturbs along its own
                gradient). With a GradScaler, only the second pass then decides whether the update is skipped, since the
                ranks must agree.

        The second pass comes after the block. If the body raises, the weights are w. Warns if ``sync`` is False in one
        of several processes, and ``model`` has no synchronisation to leave out.

        Raises:
            RuntimeError: a step is under way.
            TypeError: ``model`` is neither a module nor a list or tuple of modules.
            ValueError: ``replay_rng`` or ``sync`` is neither True nor False; or ``sync=False`` where a replica can have
                no gradient of its own: with FSDP2 without HSDP, or in DDP's first pass with a static graph.
        """
        self._require_restored("first_pass")
        check_flag("replay_rng", replay_rng)
        check_flag("sync", sync)
        models = as_models(model, "first_pass(model)")
        if not (replay_rng and are_new(self._gradients())):  # else this adds to the first pass of other micro-batches
            self._step.random_states.clear()
        if replay_rng:
            self._step.random_states.append(RandomState.capture(devices_of(self.param_groups)))
        self._step.own_gradient = self._step.without_sync = not sync
        self._step.first_pass_entered = True
        try:
            with ExitStack() as stack:
                found = [stack.enter_context(without_gradient_sync(module)) for module in models if not sync]
                if not (sync or any(found) or self._perturbation.storage.process_wide):
                    warn_if_several_processes()
                self._step.unused = unused_weights(models, self.param_groups)
                for p in self._step.unused:
                    p.requires_grad = False
                yield
            self._step.train_unused()
        except BaseException:
            self._give_up()
            raise
        finally:
            self._step.without_sync = False

    @contextmanager
    def second_pass(self, model: Models, extra_buffers: ExtraBuffers = ()) -> Iterator[None]:
        """Around the second forward and backward. If there was a first pass, the BatchNorm statistics of ``model`` end
        as they were. If ``first_pass`` was asked to remember the random state, dropout draws the same masks again. If
        the body raises, the weights are restored before the exception goes on.

        ``break``, ``continue`` and ``return`` out of the body are a normal end: the weights stay perturbed, for the
        second_step that follows. Call ``restore()`` before them to give the step up.

        Args:
            model: the model, or a list or tuple of models.
            extra_buffers: further buffers that are to end as they were; see :func:`sam_fast.disable_running_stats`.

        Raises:
            RuntimeError: there was no first_step, or this is inside ``first_pass(sync=False)``.
            TypeError: ``model`` or ``extra_buffers`` is of the wrong type. The weights are still perturbed, as after
                any wrong call.
            ValueError: a pattern in ``extra_buffers`` matches nothing. The weights are still perturbed.
        """
        self._require_first_step("second_pass")
        self._step.require_sync("second_pass")
        models, extra_buffers = check_models(model, extra_buffers, "second_pass(model)")
        if not self._step.active:  # a step that does not perturb may come without first_step()
            self.first_step()
        random_state = self._step.next_random_state()
        try:
            if self._perturbation.storage.process_wide:
                for module in models:
                    forget_gathered_weights(module)
            frozen = frozen_running_stats(models, extra_buffers) if self._step.first_pass_done else nullcontext()
            with frozen, nullcontext() if random_state is None else random_state.replayed():
                yield
        except BaseException:
            self.restore()
            raise


def unused_weights(models: Iterable[nn.Module], param_groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The weights whose gradients the first pass does not need: those that are not perturbed, if others are. An empty
    list in DDP and FSDP2, which wait for every gradient.
    """
    by_perturb: dict[bool, list[Tensor]] = {True: [], False: []}
    for group in param_groups:
        by_perturb[bool(group.get("perturb", True))] += group["params"]
    unused = [p for p in by_perturb[False] if p.requires_grad and p.is_leaf]
    if not unused or not any(p.requires_grad for p in by_perturb[True]):
        return []
    modules = [type(m) for model in models for m in model.modules()]
    waits = any(hasattr(m, name) for m in modules for name in ("no_sync", "set_requires_gradient_sync"))
    return [] if waits else unused


def learns_graph(module: Any) -> bool:
    """Whether a DDP module has a static graph that it has yet to see in a backward pass with synchronisation."""
    return getattr(module, "static_graph", False) and not getattr(
        module, "_static_graph_delay_allreduce_enqueued", True
    )


def several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def warn_if_several_processes() -> None:
    """Warn that there was no synchronisation to leave out. In one process there never is any."""
    if several_processes():
        warnings.warn(
            "first_pass(model, sync=False) finds no DistributedDataParallel in model. If there is one around it, its "
            "gradients are synchronised all the same: pass the DistributedDataParallel itself, as it is called",
            RuntimeWarning,
            stacklevel=4,
        )


@contextmanager
def without_gradient_sync(model: Any) -> Iterator[bool]:
    """Run forward and backward of ``model`` without gradient synchronisation, wherever in it a DDP or FSDP2 module is.

    Yields whether there is such a module. Other models have no synchronisation to leave out.

    Raises:
        ValueError: an FSDP2 module is sharded over all processes, so that no process has a gradient of its own; or a
            DDP module with a static graph has not had a pass with synchronisation yet.
    """
    found = False
    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(type(module), "no_sync"):
                if learns_graph(module):
                    raise ValueError(
                        "first_pass(model, sync=False) cannot be the first pass of "
                        "DistributedDataParallel(static_graph=True), which learns the graph in a backward pass with "
                        "synchronisation: use sync=True in the first step"
                    )
                stack.enter_context(module.no_sync())
            elif is_fsdp_module(module):
                stack.enter_context(own_gradients(module))
            elif hasattr(type(module), "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
            else:
                continue
            found = True
        yield found
