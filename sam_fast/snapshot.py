"""A copy of running statistics that can be put back."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from .backends import Backend, Bucket, choose
from .running_stats import (
    COUNTER,
    ExtraBuffers,
    Layers,
    Models,
    as_models,
    find_layers,
    is_statistic,
    owners_of,
)


def _with_memory(tensor: Tensor | None, unwrap: bool) -> Tensor | None:
    """The tensor, or None if it has no memory of its own: it is lazy, or wraps another one inside a torch.func
    transform, such as vmap over an ensemble. With ``unwrap``, the tensor that it wraps.
    """
    functorch = torch._C._functorch
    if tensor is None:
        return None
    while unwrap and (functorch.is_batchedtensor(tensor) or functorch.is_gradtrackingtensor(tensor)):
        tensor = functorch.get_unwrapped(tensor)
    return None if is_lazy(tensor) or functorch.is_functorch_wrapped_tensor(tensor) else tensor


class BatchNormSnapshot:
    """A copy of all running statistics of ``model``, taken and put back in one fused call per device and dtype.

    It covers the buffers, frozen parameters and tensors in plain attributes that are named ``running_*``, ``moving_*``
    or ``num_batches_tracked`` (also as the last part of a path, ``norm/moving_mean``), and those that ``extra_buffers``
    names. It covers every module that ``model`` has, or keeps in plain lists and the like, when the snapshot is made,
    in training or evaluation mode. Lazy modules that have not run yet are left as they are.

    Args:
        model: any module, or a list or tuple of modules. The snapshot does not keep them alive.
        extra_buffers: what else to copy; see :data:`sam_fast.running_stats.ExtraBuffers`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a pattern in ``extra_buffers`` matches nothing.
    """

    _in_place = False

    def __init__(self, model: Models, extra_buffers: ExtraBuffers = ()) -> None:
        self._use(find_layers(as_models(model, "BatchNormSnapshot(model)"), extra_buffers))

    @classmethod
    def _of_layers(cls, layers: Layers, in_place: bool = False) -> BatchNormSnapshot:
        """``in_place``: only :meth:`_restore_in_place` will be called."""
        snapshot = cls.__new__(cls)
        snapshot._in_place = in_place
        snapshot._use(layers)
        return snapshot

    def _use(self, layers: Layers) -> None:
        # Weak: a layer may have a hook that leads to its model, and snapshots are kept for reuse.
        self._layers = [ref(layer) for layer in layers.modules]
        self._extra = [layers.extra.get(layer, frozenset()) for layer in layers.modules]
        self._owned: list[tuple[Any, int]] = [  # collections of tensors by name, each with the index of its layer
            (owned, index)
            for index, (layer, extra) in enumerate(zip(layers.modules, self._extra, strict=True))
            for owned in owners_of(layer, extra)
        ]
        self._names: list[tuple[str, ...]] = []
        self._places: list[tuple[Any, str, int]] = []
        self._tensors: list[Tensor | None] = []
        self._versioned: list[Tensor] = []
        self._versions: list[int] = []
        self._buckets: list[Bucket] = []
        self._saved = False

    def _covers(self, layers: Layers) -> bool:
        """True if these are the snapshot's layers."""
        if len(layers.modules) != len(self._layers):
            return False
        named = bool(layers.extra) or any(self._extra)
        if named and [layers.extra.get(layer, frozenset()) for layer in layers.modules] != self._extra:
            return False
        return all(known() is layer for known, layer in zip(self._layers, layers.modules, strict=True))

    def save(self) -> None:
        """Copy the statistics. A second ``save`` replaces the first."""
        if not (self._is_unchanged() and all(bucket.save() for bucket in self._buckets)):
            self._build()
            for bucket in self._buckets:
                bucket.save()
        self._note_versions()
        self._saved = True

    def restore(self) -> None:
        """Put the statistics back, bit for bit. May be called any number of times after one ``save``.

        Raises:
            RuntimeError: nothing was saved.
        """
        if not self._saved:
            raise RuntimeError("BatchNormSnapshot.restore() needs save() before it")
        self._restore_in_place()
        if not all(map(is_, self._look_up(), self._tensors)):
            self._put_back(range(len(self._layers)), replaced_only=True)

    def _restore_in_place(self) -> None:
        """Put the values back into the tensors that were saved, whoever has them now."""
        for bucket in self._buckets:
            try:
                bucket.restore(release=False)
            except RuntimeError:
                if not _reshape(bucket):
                    raise
            if bucket.empty:  # the kernels skip tensors without elements
                _reshape(bucket)
        # Autograd may have saved a statistic that a layer changed in place: it must notice that the value is gone.
        # PyTorch's own layers change theirs without a new version, since their backward does not need them.
        versions = [t._version for t in self._versioned]
        if versions != self._versions:
            compared = zip(self._versioned, self._versions, versions, strict=True)
            increment_version([t for t, old, new in compared if old != new])
            self._note_versions()

    def _restore_layers(self, layers: Iterable[nn.Module]) -> None:
        """Restore some of the layers only."""
        chosen = set(layers)
        self._put_back([index for index, layer in enumerate(self._layers) if layer() in chosen], replaced_only=False)
        self._note_versions()

    def _note_versions(self) -> None:
        self._versions = [t._version for t in self._versioned]

    def _has_changed(self, counters: bool = True) -> bool:
        """Whether a statistic is another tensor or has another version than after the last save or restore.

        When PyTorch's BatchNorm runs, only its counter gets a new version. In other layers, and in compiled ones,
        everything that they change does. ``counters=False`` leaves counters out.
        """
        if not self._is_unchanged():
            return True
        changed = [t for t, old in zip(self._versioned, self._versions, strict=True) if t._version != old]
        if counters or not changed:
            return bool(changed)
        named = zip(self._places, self._tensors, strict=True)
        left_out = {id(tensor) for (_, name, _), tensor in named if name == COUNTER}
        return any(id(tensor) not in left_out for tensor in changed)

    def _look_up_names(self) -> list[tuple[str, ...]]:
        return [tuple(owned) for owned, _ in self._owned]

    def _look_up(self) -> list[Tensor | None]:
        return [owned.get(name) for owned, name, _ in self._places]

    def _is_unchanged(self) -> bool:
        """True if the layers have the same statistics, by name and object, as when the buckets were built."""
        return self._names == self._look_up_names() and all(map(is_, self._look_up(), self._tensors))

    def _build(self) -> None:
        self._names = self._look_up_names()
        self._places = [
            (owned, name, index)
            for (owned, index), names in zip(self._owned, self._names, strict=True)
            for name in names
            if is_statistic(name) or name in self._extra[index]
        ]
        # A lazy buffer becomes a real one without becoming another object: remembered as None, it is looked at again
        # next time.
        self._tensors = [_with_memory(tensor, self._in_place) for tensor in self._look_up()]
        members: dict[tuple[torch.device, torch.dtype, Backend], list[Tensor]] = {}
        seen: set[int] = set()
        for tensor in self._tensors:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                members.setdefault((tensor.device, tensor.dtype, choose(tensor, arithmetic=False)), []).append(tensor)
        self._versioned = [tensor for tensors in members.values() for tensor in tensors if not tensor.is_inference()]
        self._buckets = [backend.bucket(tensors, [0] * len(tensors)) for (_, _, backend), tensors in members.items()]

    def _put_back(self, chosen: Iterable[int], replaced_only: bool) -> None:
        """Put the statistics of the layers ``chosen`` back one by one. With ``replaced_only``, only those for which the
        layer now has another tensor.

        A layer that assigns new tensors gets its old one back: the new one may be needed by its backward. A layer that
        was moved to another device or dtype gets a new one there with the old values.
        """
        backups: dict[int, Tensor] = {}
        for bucket in self._buckets:
            backups.update(zip(map(id, bucket.tensors), bucket.backups, strict=True))
        chosen = set(chosen)
        for (owned, name, index), old in zip(self._places, self._tensors, strict=True):
            new = owned.get(name)
            if old is None or new is None or index not in chosen or (replaced_only and new is old):
                continue
            if (new.device, new.dtype) == (old.device, old.dtype):
                _copy_back(old, backups[id(old)])
                owned[name] = old
            else:
                owned[name] = backups[id(old)].to(new.device, new.dtype, copy=True)


def _copy_back(tensor: Tensor, backup: Tensor) -> None:
    if tensor.shape != backup.shape:
        with torch.no_grad():
            tensor.resize_(backup.shape)
    tensor.data.copy_(backup)


def _reshape(bucket: Bucket) -> bool:
    """Give tensors that were resized in place, as observers do, their old shapes and values. False if none was."""
    saved = zip(bucket.tensors, bucket.backups, strict=True)
    resized = [(tensor, backup) for tensor, backup in saved if tensor.shape != backup.shape]
    for tensor, backup in resized:
        _copy_back(tensor, backup)
    return bool(resized)
