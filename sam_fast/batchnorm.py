"""Keeping BatchNorm statistics right: SAM's second forward pass runs at ``w + e``, and must not count.

The statistics are copied before the second pass and copied back after it. Unlike setting ``momentum`` to 0 or ``track_running_stats`` to
False this keeps ``num_batches_tracked`` right, survives NaN batches, works for any layer that keeps statistics, and changes no attribute of
any module, so ``torch.compile`` has nothing to recompile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .backends import Backend, choose
from .bucket import Bucket


def _is_statistic(name: str) -> bool:
    return name.startswith(("running_", "moving_")) or name == "num_batches_tracked"


def _find_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that keep running statistics, found by their buffers: every BatchNorm, SyncBatchNorm, InstanceNorm with tracking, custom ones."""
    found, seen, stack = [], set(), [model]
    while stack:
        module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in module._buffers:
            if _is_statistic(name):
                found.append(module)
                break
        stack.extend(child for child in module._modules.values() if child is not None)
    return found


class BatchNormSnapshot:
    """A copy of all running statistics of ``model``, taken and put back in one fused call per device and dtype.

    Covered are the buffers named ``running_*``, ``moving_*`` and ``num_batches_tracked`` of every module that ``model`` has when the snapshot is
    made. Modules without statistics, in evaluation mode or lazy and not yet run are left as they are.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._use(_find_layers(model))

    @classmethod
    def _of_layers(cls, layers: list[nn.Module]) -> BatchNormSnapshot:
        snapshot = cls.__new__(cls)
        snapshot._use(layers)
        return snapshot

    def _use(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        self._places = [(layer._buffers, name) for layer in layers for name in layer._buffers if _is_statistic(name)]
        self._tensors: list[Tensor | None] = []
        self._buckets: list[Bucket] = []
        self._saved = False

    def save(self) -> None:
        """Copy the statistics. A second ``save`` replaces the first."""
        tensors = self._look_up()
        if not (self._is_known(tensors) and all(bucket.backend.save(bucket) for bucket in self._buckets)):
            self._build(tensors)
            for bucket in self._buckets:
                bucket.backend.save(bucket)
        self._saved = True

    def restore(self) -> None:
        """Put the statistics back, bit for bit. May be called any number of times after one ``save``.

        Raises:
            RuntimeError: nothing was saved.
        """
        if not self._saved:
            raise RuntimeError("BatchNormSnapshot.restore() needs save() before it")
        for bucket in self._buckets:
            bucket.backend.restore(bucket, release=False)
        tensors = self._look_up()
        if not self._is_known(tensors):
            self._restore_replaced(tensors)

    def _look_up(self) -> list[Tensor | None]:
        return [buffers.get(name) for buffers, name in self._places]

    def _is_known(self, tensors: list[Tensor | None]) -> bool:
        return len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))

    def _build(self, tensors: list[Tensor | None]) -> None:
        members: dict[tuple[torch.device, torch.dtype, Backend], list[Tensor]] = {}
        seen: set[int] = set()
        for tensor in tensors:
            if tensor is not None and not is_lazy(tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                members.setdefault((tensor.device, tensor.dtype, choose(tensor, arithmetic=False)), []).append(tensor)
        self._buckets = [Bucket(rows, [0] * len(rows), backend) for (_, _, backend), rows in members.items()]
        self._tensors = tensors

    def _restore_replaced(self, tensors: list[Tensor | None]) -> None:
        """The model was moved in between: its buffers are other tensors than those that were saved."""
        backups = {id(row): backup for bucket in self._buckets for row, backup in zip(bucket.rows, bucket.flat_rows, strict=True)}
        for old, new in zip(self._tensors, tensors, strict=True):
            if new is not old and new is not None and id(old) in backups:
                new.data.copy_(backups[id(old)])


# Snapshots that disable_running_stats took and enable_running_stats will put back, by the model that was named. No layer is in two of them.
_disabled: WeakKeyDictionary[nn.Module, BatchNormSnapshot] = WeakKeyDictionary()
# Snapshots kept for their buffers, so that a training loop builds them once.
_spare: WeakKeyDictionary[nn.Module, BatchNormSnapshot] = WeakKeyDictionary()


def _borrow(model: nn.Module, layers: list[nn.Module]) -> BatchNormSnapshot:
    spare = _spare.pop(model, None)
    if spare is not None and len(spare.layers) == len(layers) and all(a is b for a, b in zip(spare.layers, layers, strict=True)):
        return spare
    return BatchNormSnapshot._of_layers(layers)


def disable_running_stats(model: nn.Module) -> None:
    """From here to :func:`enable_running_stats` forward passes of ``model`` do not count in its running statistics.

    They are saved here and put back there. Calling it again changes nothing.
    """
    taken = {layer for snapshot in _disabled.values() for layer in snapshot.layers}
    layers = _find_layers(model)
    if taken:
        layers = [layer for layer in layers if layer not in taken]
    if layers:
        snapshot = _borrow(model, layers)
        snapshot.save()
        _disabled[model] = snapshot


def enable_running_stats(model: nn.Module) -> None:
    """Undo :func:`disable_running_stats`: the statistics are what they were then. Does nothing if it was not called.

    ``model`` may also be a wrapper or the wrapped part of the model that was disabled.
    """
    if model in _disabled:
        found = [model]
    elif _disabled:
        layers = set(_find_layers(model))
        found = [root for root, snapshot in _disabled.items() if not layers.isdisjoint(snapshot.layers)]
    else:
        return
    for root in found:
        snapshot = _disabled.pop(root)
        snapshot.restore()
        _spare[root] = snapshot


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Forward passes inside do not count in the running statistics of ``model``, however the body ends. May be nested."""
    snapshot = _borrow(model, _find_layers(model))
    snapshot.save()
    try:
        yield
    finally:
        snapshot.restore()
        _spare[model] = snapshot
