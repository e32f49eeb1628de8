"""What integrations share: the forward passes since gradients were zeroed, and how to run them again at ``w + e``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.memory import is_plain
from ..batches import every_row, number_of_rows, versions_of, warn_of_written, with_own_containers
from ..devices import devices_of
from ..random_state import RandomState
from ..running_stats import ExtraBuffers, note_untrained, warn_of_changed
from ..sam import SAM
from ..train_step import accumulating, stride_of


@dataclass
class Forward:
    """A call of the framework's forward pass: its arguments, the random state and the owner's numbers before it, and
    the loss that it returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: RandomState | None
    numbers: dict[str, _Number]
    loss: Tensor | None = None


class Window:
    """The forward passes whose gradients are accumulated for one step.

    Args:
        sam: the optimizer.
        owner: the user's object whose methods are called. Attributes that are numbers, or tensors of one, with which it
            may count or anneal, have the same values in the second pass as in the first, and count the first pass only.
            What the second pass appends to lists is removed.
        ascent: share of each batch that the first pass sees.
        replay_rng: the second pass draws what the first one drew.
        extra_buffers: further buffers that only the first pass may change.
    """

    def __init__(self, sam: SAM, owner: Any, ascent: float, replay_rng: bool, extra_buffers: ExtraBuffers) -> None:
        self.sam, self.owner = sam, owner
        self.every, self.replay_rng = stride_of(ascent, replay_rng), replay_rng
        self.extra_buffers = extra_buffers
        self.forwards: list[Forward] = []
        self._looked = False  # whether the first pass writes into its batch
        self._looked_again = False  # whether the second one changes what is not trained

    def first(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``forward(*args, **kwargs)`` as a part of the first pass and remember it. The caller sets its loss.

        In a step that needs no first pass this is the only one, and is not remembered.
        """
        sam = self.sam
        if not sam.needs_first_pass:
            return forward(*args, **kwargs)
        random_state = RandomState.capture(devices_of(sam.param_groups)) if self.replay_rng else None
        numbers = _numbers_of(self.owner, sam)
        self.forwards.append(Forward(with_own_containers(args), with_own_containers(kwargs), random_state, numbers))
        if self.every > 1:
            if not number_of_rows([args, kwargs]):
                raise ValueError("ascent below 1 takes rows of the batch's tensors, but there is no tensor with rows")
            args, kwargs = every_row((args, kwargs), self.every)
        if self._looked:
            return forward(*args, **kwargs)
        self._looked, batch = True, [self.forwards[-1].args, self.forwards[-1].kwargs]
        versions = versions_of(batch)
        output = forward(*args, **kwargs)
        warn_of_written(batch, versions, stacklevel=4)  # not the integration, but the framework
        return output

    def keep_last(self) -> None:
        """Forget all but the last forward pass: gradients are zeroed between that and its backward pass."""
        del self.forwards[:-1]

    def clear(self) -> None:
        """Forget all forward passes."""
        self.forwards.clear()

    def second(self, model: Any, forward: Callable[..., Tensor | None]) -> tuple[Tensor, Tensor] | None:
        """Perturb along the gradients, and run all forward passes again.

        Does nothing in steps that need no first pass. The weights are then at ``w + e``, with the second gradients.

        Args:
            model: as it is called, for BatchNorm statistics and synchronisation.
            forward: runs a forward and a backward pass; returns the loss, or None if there was none.

        Returns:
            The loss of both passes, where they saw the same rows.
        """
        sam = self.sam
        if not sam.needs_first_pass:
            return None
        forwards = [f for f in self.forwards if f.loss is not None]
        sam.first_step(zero_grad=True)
        losses, numbers = [], _numbers_of(self.owner, sam)
        lengths = [(collected, len(collected)) for collected in _lists_of(self.owner)]
        with sam.second_pass(model, self.extra_buffers):
            others = None if self._looked_again else note_untrained([model], sam.param_groups, self.extra_buffers)
            try:
                for number, again in enumerate(forwards, 1):
                    synced = nullcontext() if number == len(forwards) else accumulating(model)
                    drawn = nullcontext() if again.random_state is None else again.random_state.replayed()
                    _put_back(self.owner, again.numbers)
                    with synced, drawn:
                        losses.append(forward(*again.args, **again.kwargs))
            finally:
                _put_back(self.owner, numbers)
                for collected, length in lengths:
                    del collected[length:]
            if others is not None:
                self._looked_again = True
                warn_of_changed(others, [model], sam.param_groups, stacklevel=4)
        firsts = [f.loss for f in forwards]
        self.clear()
        if self.every > 1 or not losses or any(loss is None for loss in losses):
            return None
        return sum(firsts), sum(losses)  # type: ignore[arg-type,return-value]


@contextmanager
def at_w(sam: SAM) -> Iterator[None]:
    """Inside, the weights are w, for a checkpoint that is saved in the middle of a step, as after a signal. Afterwards
    they are ``w + e`` again, and a pass that is under way does not notice.
    """
    perturbation = sam._perturbation
    if not perturbation.active:
        yield
        return
    saved = []
    for bucket in perturbation.buckets:
        indices = bucket.saved() if bucket.is_backed_up() else []  # else nothing has moved yet
        for index in range(len(bucket.tensors)) if indices is None else indices:
            saved.append((bucket.tensors[index].data, bucket.backups[index]))
    moved = [tensor.to("cpu", copy=True) for tensor, _ in saved]  # the device may have none left
    try:
        for tensor, backup in reversed(saved):  # a later one may have saved what an earlier one, sharing memory, moved
            tensor.copy_(backup)
        perturbation.active = False
        yield
    finally:
        for (tensor, _), there in zip(saved, moved, strict=True):
            tensor.copy_(there)
        perturbation.active = True


class _Number(NamedTuple):
    """An attribute that is a number; of a tensor also a copy, and the version that writing into it changes."""

    value: Any
    copy: Tensor | None = None
    version: int = 0


def _is_number(value: Any) -> bool:
    """Whether it is a number, also NumPy's, or a tensor of one. Flags, and attributes that were None, are left alone:
    they may say that something was made, which must not be made again.
    """
    if type(value) is Tensor:
        return value.numel() == 1 and value.dtype != torch.bool
    return isinstance(value, Number) and not isinstance(value, bool)


def _numbers_of(owner: Any, sam: SAM) -> dict[str, _Number]:
    """The attributes that are numbers. What has the memory of a weight, which SAM moves, is not to be written."""
    found = {name: _Number(value) for name, value in vars(owner).items() if _is_number(value)}
    tensors = [(name, value) for name, (value, *_) in found.items() if type(value) is Tensor]
    params = (p for group in sam.param_groups for p in group["params"] if tensors)
    weights = {p.untyped_storage().data_ptr() for p in params if is_plain(p)}
    for name, value in tensors:
        if not (value.is_inference() or (is_plain(value) and value.untyped_storage().data_ptr() in weights)):
            found[name] = _Number(value, value.detach().clone(), value._version)
    return found


def _put_back(owner: Any, numbers: dict[str, _Number]) -> None:
    """Give the attributes that are numbers the values that they had."""
    own = vars(owner)
    for name in [name for name, value in own.items() if _is_number(value)]:
        if name in numbers:
            own[name], copy, version = numbers[name]
            if copy is not None and own[name]._version != version:
                with torch.no_grad():
                    own[name].copy_(copy)
        elif _is_number(getattr(type(owner), name, None)):  # it began as the class's
            del own[name]


def _lists_of(owner: Any) -> Iterator[list[Any]]:
    """The lists in attributes, and in dictionaries of lists there."""
    for value in vars(owner).values():
        if isinstance(value, list):
            yield value
        # Only the first value tells: a dictionary of other things may be a large one.
        elif isinstance(value, dict) and isinstance(next(iter(value.values()), None), list):
            yield from (item for item in value.values() if isinstance(item, list))
