"""Keeping BatchNorm statistics right: SAM's second forward pass runs at ``w + e``, and must not count.

The statistics are copied before the second pass and copied back after it. Unlike setting ``momentum`` to 0 or ``track_running_stats`` to
False this keeps ``num_batches_tracked`` right, survives NaN batches, works for any layer that keeps statistics, and changes no attribute of
any module, so ``torch.compile`` has nothing to recompile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
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
        for name in module._buffers.keys():  # noqa: SIM118 - a scripted module's is no dict and cannot be iterated
            if _is_statistic(name):
                found.append(module)
                break
        stack.extend(child for child in module._modules.values() if child is not None)
    return found


class _ScriptedBuffers:
    """A scripted module's buffers, with the part of a dict's interface that is used here."""

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)

    def __iter__(self) -> Iterator[str]:
        module = self._module()
        return iter([] if module is None else list(module._buffers.keys()))

    def get(self, name: str) -> Tensor | None:
        return getattr(self._module(), name, None)

    def __setitem__(self, name: str, value: Tensor) -> None:
        setattr(self._module(), name, value)


class BatchNormSnapshot:
    """A copy of all running statistics of ``model``, taken and put back in one fused call per device and dtype.

    Covered are the buffers named ``running_*``, ``moving_*`` and ``num_batches_tracked`` of every module that ``model`` has when the snapshot is
    made. Modules without statistics, in evaluation mode or lazy and not yet run are left as they are.

    Args:
        model: any module. It is not kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._use(_find_layers(model))

    @classmethod
    def _of_layers(cls, layers: list[nn.Module]) -> BatchNormSnapshot:
        snapshot = cls.__new__(cls)
        snapshot._use(layers)
        return snapshot

    def _use(self, layers: list[nn.Module]) -> None:
        # Weak: a layer may have a hook that leads to its model, and snapshots are kept for reuse.
        self._layers = [ref(layer) for layer in layers]
        self._owned: list[Any] = [layer._buffers if isinstance(layer._buffers, dict) else _ScriptedBuffers(layer) for layer in layers]
        self._names: list[tuple[str, ...]] = []
        self._places: list[tuple[Any, str]] = []
        self._tensors: list[Tensor | None] = []
        self._versioned: list[Tensor] = []
        self._versions: list[int] = []
        self._buckets: list[Bucket] = []
        self._saved = False

    def _covers(self, layers: list[nn.Module]) -> bool:
        """True if these are the snapshot's layers."""
        return len(layers) == len(self._layers) and all(known() is layer for known, layer in zip(self._layers, layers, strict=True))

    def save(self) -> None:
        """Copy the statistics. A second ``save`` replaces the first."""
        if not (self._is_unchanged() and all(bucket.backend.save(bucket) for bucket in self._buckets)):
            self._build()
            for bucket in self._buckets:
                bucket.backend.save(bucket)
        self._versions = [t._version for t in self._versioned]
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
        # Autograd may have saved a statistic that a layer changed in place: it must notice that the value is gone. PyTorch's own layers change
        # theirs without a new version, since their backward does not need them.
        increment_version([t for t, version in zip(self._versioned, self._versions, strict=True) if t._version != version])
        if not all(map(is_, self._look_up(), self._tensors)):
            self._put_back(self._owned, replaced_only=True)

    def _restore_layers(self, layers: Iterable[nn.Module]) -> None:
        """Restore some of the layers only."""
        chosen = set(layers)
        self._put_back([owned for layer, owned in zip(self._layers, self._owned, strict=True) if layer() in chosen], replaced_only=False)

    def _look_up(self) -> list[Tensor | None]:
        return [owned.get(name) for owned, name in self._places]

    def _is_unchanged(self) -> bool:
        """True if the layers have the same buffers, by name and object, as when the buckets were built."""
        return self._names == [tuple(owned) for owned in self._owned] and all(map(is_, self._look_up(), self._tensors))

    def _build(self) -> None:
        self._names = [tuple(owned) for owned in self._owned]
        self._places = [(owned, name) for owned, names in zip(self._owned, self._names, strict=True) for name in names if _is_statistic(name)]
        # A lazy buffer becomes a real one without becoming another object: remembered as None, it is looked at again next time.
        self._tensors = [None if tensor is None or is_lazy(tensor) else tensor for tensor in self._look_up()]
        members: dict[tuple[torch.device, torch.dtype, Backend], list[Tensor]] = {}
        seen: set[int] = set()
        for tensor in self._tensors:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                members.setdefault((tensor.device, tensor.dtype, choose(tensor, arithmetic=False)), []).append(tensor)
        self._versioned = [row for rows in members.values() for row in rows if not row.is_inference()]
        self._buckets = [Bucket(rows, [0] * len(rows), backend) for (_, _, backend), rows in members.items()]

    def _put_back(self, chosen: list[Any], replaced_only: bool) -> None:
        """Put statistics back one by one: where a layer now has another tensor under the name, and for some layers only.

        A layer that assigns new tensors gets its old one back: the new one may be needed by its backward. A layer that was moved to another
        device or dtype gets a new one there with the old values.
        """
        backups = {id(row): backup for bucket in self._buckets for row, backup in zip(bucket.rows, bucket.flat_rows, strict=True)}
        chosen_ids = {id(owned) for owned in chosen}
        for (owned, name), old in zip(self._places, self._tensors, strict=True):
            new = owned.get(name)
            if old is None or new is None or id(owned) not in chosen_ids or (replaced_only and new is old):
                continue
            if (new.device, new.dtype) == (old.device, old.dtype):
                old.data.copy_(backups[id(old)])
                owned[name] = old
            else:
                owned[name] = backups[id(old)].to(new.device, new.dtype, copy=True)


# The layers that disable_running_stats was called for, and the snapshot that each is in.
_disabled: WeakKeyDictionary[nn.Module, BatchNormSnapshot] = WeakKeyDictionary()
# Snapshots that are not in use, kept so that a training loop builds its snapshot once.
_spare: WeakKeyDictionary[nn.Module, BatchNormSnapshot] = WeakKeyDictionary()


def _borrow(model: nn.Module, layers: list[nn.Module]) -> BatchNormSnapshot:
    spare = _spare.pop(model, None)
    return spare if spare is not None and spare._covers(layers) else BatchNormSnapshot._of_layers(layers)


def disable_running_stats(model: nn.Module) -> None:
    """From here to :func:`enable_running_stats` forward passes of ``model`` do not count in its running statistics.

    They are saved here and put back there. A layer for which this was already called keeps what was saved then.
    """
    layers = _find_layers(model)
    if _disabled:
        layers = [layer for layer in layers if layer not in _disabled]
    if layers:
        snapshot = _borrow(model, layers)
        snapshot.save()
        _disabled.update((layer, snapshot) for layer in layers)


def enable_running_stats(model: nn.Module) -> None:
    """Undo :func:`disable_running_stats` for the layers of ``model``: the statistics are what they were then.

    Does nothing to layers for which it was not called. ``model`` may be the model that was disabled, a wrapper of it or a part.
    """
    if not _disabled:
        return
    members: dict[BatchNormSnapshot, list[nn.Module]] = {}
    for layer in _find_layers(model):
        snapshot = _disabled.pop(layer, None)
        if snapshot is not None:
            members.setdefault(snapshot, []).append(layer)
    for snapshot, layers in members.items():
        if snapshot._covers(layers):
            snapshot.restore()
            _spare[model] = snapshot
        else:
            snapshot._restore_layers(layers)


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
