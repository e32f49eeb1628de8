"""A whole SAM iteration in one call, under any schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    _GeneratorContextManager,
    contextmanager,
    nullcontext,
)
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .amp import without_scale
from .batches import every_row, number_of_rows, slice_rows, versions_of, warn_of_written, with_own_containers
from .closure_stats import refers_to
from .closures import accelerate_accumulates
from .gradients import are_new
from .options import check_at_least_zero, check_count, check_flag, check_loss_fn
from .passes import learns_graph
from .running_stats import ExtraBuffers, check_models, note_untrained, warn_of_changed
from .storage.fsdp import forget_gathered_weights, has_fsdp1
from .unwrapping import unwrap


class StepResult(NamedTuple):
    """What a :class:`TrainStep` returns: 0-d tensors on the device. Only reading their values waits for it.

    Attributes:
        loss: mean over the whole batch, in the dtype that ``loss_fn`` returns. If the first pass saw all of the batch,
            this is its loss, at w; else it is the second pass's.
        sharpness: L(w + e) - L(w), in the same dtype, if both passes saw the same samples, else None. With dropout
            the two losses have different masks, unless ``replay_rng=True``.
        grad_norm: ``||T g||`` of the first pass's gradient, in float64, times any factor by which ``backward`` has
            scaled the loss; None if the step did not perturb.
    """

    loss: Tensor
    sharpness: Tensor | None
    grad_norm: Tensor | None


class TrainStep:
    """Does a whole SAM iteration: ``result = step(*batch)``.

    Takes care of BatchNorm statistics (also of other modules that ``loss_fn`` refers to), random state, scaler,
    clipping and gradient synchronisation. If anything raises, the weights are restored and the gradients reset. Warns
    once if the optimizer has none of the model's trainable parameters.

    Args:
        model: the model as it is called: its DDP or FSDP2 wrapper if there is one.
        optimizer: a SAM, or a framework's wrapper around one.
        loss_fn: ``loss_fn(model, *batch)`` returns the loss, a mean over the batch's rows.
        ascent: share of the batch that the first pass sees, above 0 and at most 1: rows 0, k, 2k, ... with
            ``k = round(1/ascent)``, of everything that has as many rows as the batch. With a quarter a step makes 1.25
            of SGD's passes (NFNets, https://arxiv.org/abs/2102.06171). Batches should be shuffled.
        micro_batches: the number of parts of the batch over which both passes accumulate gradients, at most one for
            each row; with ``ascent`` the first pass has its share of them.
        autocast: for forward passes and the loss: a dtype, a context manager, or a function that returns one.
        scaler: a torch.amp.GradScaler.
        clip_grad_norm: largest norm of the second gradient over all parameters, as in ``clip_grad_norm_``, but without
            writing the gradients where the second step is fused.
        replay_rng: the second pass draws the first one's dropout masks; needs ``ascent=1``.
        sync: False: each rank perturbs along its own gradient, see :meth:`sam_fast.SAM.first_pass`.
        backward: called with the loss in place of ``loss.backward()``: ``accelerator.backward``, ``fabric.backward``.
        extra_buffers: further buffers that only the first pass may change, see :func:`sam_fast.disable_running_stats`.

    Raises:
        TypeError: an argument is of the wrong type, or there is no SAM in ``optimizer``.
        ValueError: an argument is out of range, a pattern in ``extra_buffers`` fits nothing, ``replay_rng`` where
            ``ascent`` leaves rows out, ``scaler`` with ``backward``, ``backward`` of an Accelerator that accumulates,
            or a model in FSDP1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        loss_fn: Callable[..., Tensor],
        *,
        ascent: float = 1.0,
        micro_batches: int = 1,
        autocast: Any = None,
        scaler: Any = None,
        clip_grad_norm: float | None = None,
        replay_rng: bool = False,
        sync: bool = True,
        backward: Callable[[Tensor], Any] | None = None,
        extra_buffers: ExtraBuffers = (),
    ) -> None:
        check_kinds(model, loss_fn, autocast, scaler, backward)
        check_flag("sync", sync)
        stride_of(ascent, replay_rng)  # raises what a step would
        by_accelerate = type(optimizer).__name__ == "AcceleratedOptimizer" or hasattr(
            getattr(backward, "__self__", None), "gradient_accumulation_steps"
        )
        if backward is not None and by_accelerate and accelerate_accumulates():
            raise ValueError(
                "this Accelerator divides every loss by its gradient_accumulation_steps: make it with "
                "gradient_accumulation_steps=1, and let TrainStep(micro_batches=) accumulate"
            )
        check_count("micro_batches", micro_batches)
        if clip_grad_norm is not None:
            check_at_least_zero("clip_grad_norm", clip_grad_norm)
        if scaler is not None and backward is not None:
            raise ValueError("scaler and backward were both given: backward has to scale the loss itself")
        if has_fsdp1(model):
            raise ValueError("TrainStep does not work with FullyShardedDataParallel (FSDP1): use fully_shard (FSDP2)")
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.sam = unwrap(optimizer)
        self.ascent, self.micro_batches, self.autocast, self.scaler = ascent, micro_batches, autocast, scaler
        self.clip_grad_norm, self.replay_rng, self.sync, self.backward = clip_grad_norm, replay_rng, sync, backward
        self.extra_buffers = check_models(model, extra_buffers, "TrainStep(model)")[1]
        self._called = self._looked = self._warned = False

    def __call__(self, *batch: Any) -> StepResult:
        """One iteration.

        Args:
            batch: goes to ``loss_fn`` after the model: tensors, or lists, tuples and mappings of them; the first
                tensor's first dimension is the batch's. Arrays and lists with an item for each row are cut as tensors.
                With ``ascent=1`` and ``micro_batches=1`` nothing is cut, and a batch may be anything: a graph, or no
                arguments.

        Returns:
            The loss, the sharpness and the norm: a :class:`StepResult`.

        Raises:
            TypeError: something that has to be cut into rows is packed, sparse or nested, or is a list of n items with
                n rows each, so that either may be the samples; or ``loss_fn`` returns no tensor.
            ValueError: the batch has no rows, or no tensor with rows where it has to be cut; or ``loss_fn`` returns
                more than one number.
            RuntimeError: a framework's wrapper made no step, as inside ``accelerator.accumulate()``.
        """
        every, rows = stride_of(self.ascent, self.replay_rng), number_of_rows(batch)
        if rows == 0:
            raise ValueError("the batch has no rows: its first tensor's first dimension is 0")
        if rows is None and (every > 1 or self.micro_batches > 1):
            raise ValueError(
                "the batch has no tensor with rows, and ascent below 1 and micro_batches above 1 cut rows: pass what "
                "loss_fn takes after the model (tensors are looked for in lists, tuples and mappings, not in other "
                "objects)"
            )
        rows = rows or 1
        sam = self.sam
        if not self._called:
            self._called = True
            self._warn_of_other_parameters()
        if not sam._step.zeroed or are_new(sam._gradients()):
            sam.zero_grad()
        try:
            first = None
            looks = sam.needs_first_pass and not self._looked
            if sam.needs_first_pass:
                versions = versions_of(batch) if looks else None
                with sam.first_pass(self.model, replay_rng=self.replay_rng, sync=self.sync):
                    own = with_own_containers(batch)
                    part, n = (own, rows) if every == 1 else (every_row(own, every), -(-rows // every))
                    first = self._pass(part, n, -(-self.micro_batches // every), self.sync)
                if versions is not None:
                    self._looked = True
                    warn_of_written(batch, versions)
            sam.first_step(zero_grad=first is not None)
            others = refers_to(self.loss_fn)[0] if first is not None else ()  # such as a GAN's other half
            models = [self.model, *others]
            with sam.second_pass(models, self.extra_buffers):
                before = note_untrained(models, sam.param_groups, self.extra_buffers) if looks else {}
                second = self._pass(batch, rows, self.micro_batches, True)
                if looks:
                    warn_of_changed(before, models, sam.param_groups, stacklevel=3)
            if next(sam._gradients(), None) is None:
                self._warn_of_other_parameters()  # as after load_state_dict(assign=True) in mid-training
            grad_norm = without_scale(sam.grad_norm, self.scaler) if sam.perturbed else None
            self._second_step()
        except BaseException:
            sam.restore()
            sam.zero_grad()
            raise
        sam.zero_grad()
        if first is None or every > 1:  # one pass, or two that saw different samples
            return StepResult(second, None, grad_norm)
        return StepResult(first, second - first, grad_norm)

    def _warn_of_other_parameters(self) -> None:
        if self.sam._perturbation.storage.process_wide:
            forget_gathered_weights(self.model)  # gathered weights are not the optimizer's parameters
        trainable = {id(p) for p in self.model.parameters() if p.requires_grad}
        if self._warned or not trainable:
            return
        if trainable.isdisjoint(id(p) for group in self.sam.param_groups for p in group["params"]):
            self._warned = True
            warnings.warn(
                "the optimizer has none of the model's trainable parameters, and will not train it: make it from "
                "model.parameters(), after fully_shard(), load_state_dict(assign=True) or whatever else replaces them",
                RuntimeWarning,
                stacklevel=3,
            )

    def _pass(self, batch: Any, rows: int, parts: int, sync: bool) -> Tensor:
        """Forward and backward over ``parts`` parts of the batch, of about equal size. Returns the mean loss.

        The number of parts does not depend on that of rows, as long as there are enough of these: FSDP2 communicates in
        each part, and ranks may have batches of different sizes.
        """
        losses: list[Tensor] = []
        parts = min(parts, rows)
        for i in range(parts):
            begin, end = rows * i // parts, rows * (i + 1) // parts
            part = batch if end - begin == rows else slice_rows(batch, begin, end)
            with accumulating(self.model) if sync and end < rows else nullcontext():
                with self._autocast():
                    loss = self.loss_fn(self.model, *part)
                    if not isinstance(loss, Tensor):
                        raise TypeError(f"loss_fn must return the loss, a tensor, got {type(loss).__name__}")
                    if loss.numel() != 1:
                        raise ValueError(f"loss_fn must return one number, a mean, got shape {tuple(loss.shape)}")
                    if end - begin < rows:
                        loss = loss * ((end - begin) / rows)
                self._backward(loss)
            losses.append(loss.detach().reshape(()))
        return sum(losses[1:], losses[0])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        if isinstance(self.autocast, torch.dtype):
            device = next(p.device.type for group in self.sam.param_groups for p in group["params"])
            return torch.autocast(device, self.autocast)
        made: AbstractContextManager[Any] = self.autocast if is_context(self.autocast) else self.autocast()
        return made

    def _backward(self, loss: Tensor) -> None:
        if self.backward is not None:
            self.backward(loss)
        elif loss.requires_grad or not self.sam._step.unused:  # else it depends on no weight that is perturbed
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _second_step(self) -> None:
        step = self.sam._step
        step.clip_grad_norm = self.clip_grad_norm
        try:
            if self.scaler is not None:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            elif self.optimizer is self.sam:
                self.sam.second_step()
            else:
                self.optimizer.step()
                if self.sam._step.active:
                    raise RuntimeError(
                        f"{type(self.optimizer).__name__}.step() made no step, as inside accelerator.accumulate(): "
                        "TrainStep is a whole step, with TrainStep(micro_batches=) parts of it; leave accumulate() out"
                    )
        finally:
            step.clip_grad_norm = None


def is_context(value: Any) -> bool:
    return hasattr(type(value), "__enter__")


def check_kinds(model: Any, loss_fn: Any, autocast: Any, scaler: Any, backward: Any) -> None:
    """Raise TypeError if one of these arguments of :class:`TrainStep` is of the wrong kind."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: TrainStep(model, optimizer, loss_fn)"
        )
    check_loss_fn(loss_fn)
    if not (autocast is None or isinstance(autocast, torch.dtype) or is_context(autocast) or callable(autocast)):
        raise TypeError(
            f"autocast must be a dtype such as torch.bfloat16, a context manager or its maker, got {autocast!r}"
        )
    if isinstance(autocast, _GeneratorContextManager):
        raise TypeError(
            "autocast must be a context manager for every pass, got one that can be entered once: pass what "
            "made it, without calling it"
        )
    if scaler is not None and not hasattr(scaler, "scale"):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if backward is not None and not callable(backward):
        raise TypeError(f"backward must be a function of the loss, got {type(backward).__name__}")


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Inside, DDP does not exchange gradients: a later micro-batch of the same pass exchanges their sum.

    FSDP2 still exchanges them, which is right but costs communication. So does DDP with a static graph until it has
    seen that graph.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(type(module), "no_sync") and not learns_graph(module):
                stack.enter_context(module.no_sync())  # type: ignore[operator]
        yield


def stride_of(ascent: float, replay_rng: bool) -> int:
    """k, where the first pass sees every k-th row.

    Raises:
        ValueError: ``ascent`` is out of range, or below 1 with ``replay_rng``; or that is neither True nor False.
    """
    check_flag("replay_rng", replay_rng)
    if not isinstance(ascent, Real) or isinstance(ascent, bool) or not 0.0 < ascent <= 1.0:
        raise ValueError(f"ascent must be above 0 and at most 1, got {ascent!r}")
    every = round(1 / ascent)
    if replay_rng and every > 1:
        raise ValueError("replay_rng=True needs ascent=1: dropout draws other masks for fewer rows")
    return every
