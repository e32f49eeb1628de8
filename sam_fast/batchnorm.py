"""Keeping BatchNorm statistics right: SAM's second forward pass runs at ``w + e``, and must not count.

The statistics are copied before the second pass and copied back after it. Unlike setting ``momentum`` to 0 or ``track_running_stats`` to
False this keeps ``num_batches_tracked`` right, survives NaN batches, works for any layer that keeps statistics, and changes no attribute of
any module, so ``torch.compile`` has nothing to recompile.

Statistics that were disabled and not enabled again are put back when a SAM step ends, so that evaluation and checkpoints see the first passes
alone. The layers stay disabled, but from there on what they hold is right, whoever has written it: a checkpoint may be loaded. It is saved
again before the next forward pass in training mode, which a hook on all modules notices. There is no such hook at any other time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, finalize, ref

import torch
from torch import Tensor, nn

from .module_hooks import ModuleHooks
from .running_stats import BatchNormSnapshot, ExtraBuffers, Layers, Models, as_models, find_layers


class _Group:
    """Layers that one call has disabled."""

    def __init__(self, snapshot: BatchNormSnapshot) -> None:
        self.snapshot = snapshot
        self.settled = False  # what the layers hold is right, and the snapshot may be out of date; otherwise it is the other way round
        self.partial = False  # some of the layers were enabled again

    def layers(self) -> list[nn.Module]:
        return [layer for layer in (known() for known in self.snapshot._layers) if layer is not None and _disabled.get(layer) is self]

    def put_back(self) -> None:
        if self.partial:
            self.snapshot._restore_layers(self.layers())
        else:
            self.snapshot.restore()

    def settle(self) -> None:
        """Note that what the layers hold is right."""
        self.settled = True
        finalize(self, _watch_if_settled).atexit = False
        if self.partial:
            extra = {known(): names for known, names in zip(self.snapshot._layers, self.snapshot._extra, strict=True)}
            layers = self.layers()
            self.snapshot = BatchNormSnapshot._of_layers(Layers(layers, {layer: extra[layer] for layer in layers if extra[layer]}))
            self.snapshot.save()
            self.partial = False


# The layers that disable_running_stats was called for. A group lives as long as one of its layers.
_disabled: WeakKeyDictionary[nn.Module, _Group] = WeakKeyDictionary()
_groups: WeakSet[_Group] = WeakSet()
# Snapshots that are not in use, kept so that a training loop builds its snapshot once.
_spare: WeakKeyDictionary[nn.Module, BatchNormSnapshot] = WeakKeyDictionary()


def save_layers(models: list[nn.Module], layers: Layers) -> BatchNormSnapshot:
    """A snapshot of ``layers``, saved: the one that was kept for ``models`` if it fits."""
    spare = _spare.pop(models[0], None) if models else None
    snapshot = spare if spare is not None and spare._covers(layers) else BatchNormSnapshot._of_layers(layers)
    snapshot.save()
    return snapshot


def keep(models: list[nn.Module], snapshot: BatchNormSnapshot) -> None:
    """Keep a snapshot that is no longer in use for the next :func:`save_layers`."""
    if models:
        _spare[models[0]] = snapshot


def disable_running_stats(model: Models, extra_buffers: ExtraBuffers = ()) -> None:
    """From here to :func:`enable_running_stats` forward passes of ``model`` do not count in its running statistics.

    They are saved here and put back there, and already when a SAM step ends. A layer for which this was called before keeps what was saved
    then. Statistics that somebody loads or resets between the end of a step and the next forward pass stand.

    Args:
        model: a module, or a list or tuple of modules.
        extra_buffers: names of further buffers that are to be kept (``"weight_u"``, ``"*.observer.*"``), or a function that takes a qualified
            name and a tensor and returns a bool. See :data:`sam_fast.running_stats.ExtraBuffers`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a pattern in ``extra_buffers`` fits nothing.
    """
    models = as_models(model, "disable_running_stats(model)")
    layers = find_layers(models, extra_buffers)
    if _disabled:
        layers = Layers([layer for layer in layers.modules if layer not in _disabled], layers.extra)
    if layers.modules:
        group = _Group(save_layers(models, layers))
        _disabled.update((layer, group) for layer in layers.modules)
        _groups.add(group)
        _below.clear()


def enable_running_stats(model: Models) -> None:
    """Undo :func:`disable_running_stats` for the layers of ``model``: the statistics are what they were then.

    Does nothing to layers for which it was not called. ``model`` may be the model that was disabled, a wrapper of it, a part, or a list of
    modules.

    Raises:
        TypeError: ``model`` is neither a module nor a list or tuple of modules.
    """
    models = as_models(model, "enable_running_stats(model)")
    if not _disabled:
        return
    _pass.give_up()
    members: dict[_Group, list[nn.Module]] = {}
    for layer in _candidates(models):
        group = _disabled.pop(layer, None)
        if group is not None:
            members.setdefault(group, []).append(layer)
    for group, layers in members.items():
        whole = len(layers) == len(group.snapshot._layers)
        if not group.settled:
            if whole:
                group.snapshot.restore()
            else:
                group.snapshot._restore_layers(layers)
        if whole:
            keep(models, group.snapshot)
            _groups.discard(group)
        else:
            group.partial = True
            if group.settled:
                group.settle()
    _watch_if_settled()


def _candidates(models: list[nn.Module]) -> Iterable[nn.Module]:
    """The modules that may have been disabled. All where the user has named buffers: their names are not asked for again."""
    seen: set[nn.Module] = set()
    layers = find_layers(models, seen=seen).modules
    return seen if any(any(group.snapshot._extra) for group in _groups) else layers


@contextmanager
def frozen_running_stats(model: Models, extra_buffers: ExtraBuffers = ()) -> Iterator[None]:
    """Forward passes inside do not count in the running statistics of ``model``, however the body ends. May be nested.

    Args:
        model: a module, or a list or tuple of modules.
        extra_buffers: as in :func:`disable_running_stats`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a pattern in ``extra_buffers`` fits nothing.
    """
    models = as_models(model, "frozen_running_stats(model)")
    snapshot = save_layers(models, find_layers(models, extra_buffers))
    try:
        yield
    finally:
        snapshot.restore()
        keep(models, snapshot)


# ---- The end of a step ------------------------------------------------------------------------------------------------------------------------


def settle_running_stats(params: Iterable[Tensor]) -> None:
    """Put back what is disabled, because a SAM step ends. The layers stay disabled.

    Args:
        params: the parameters of the optimizer, with the gradients of the second pass.
    """
    if not _disabled:
        return
    _pass.give_up()
    stepped: set[int] | None = None
    for group in list(_groups):
        if not group.settled:
            group.put_back()
            group.settle()
            continue
        # No forward pass was seen since the last step. If the layers have had gradients all the same, it was where no hook is called.
        if stepped is None:
            stepped = {id(p) for p in params if p.grad is not None}
        unseen = [layer for layer in group.layers() if layer.training and any(id(p) in stepped for p in layer._parameters.values())]
        if unseen:
            group.snapshot._restore_layers(unseen)
    _watch_if_settled()


class _UncountedPass:
    """A forward pass without gradients, in training mode, of layers that are disabled: it is undone as soon as it ends."""

    def __init__(self) -> None:
        self.module: ReferenceType[nn.Module] | None = None
        self.depth = 0
        self.groups: list[_Group] = []

    def begin(self, module: nn.Module, groups: list[_Group]) -> None:
        for group in groups:
            group.snapshot.save()
        self.module, self.depth, self.groups = ref(module), 0, groups

    def give_up(self) -> None:
        """Undo it now; nothing happens if there is none."""
        groups, self.module, self.groups = self.groups, None, []
        for group in groups:
            group.put_back()


# The modules that were called, and the layers in each that were disabled.
_below: WeakKeyDictionary[nn.Module, list[ReferenceType[nn.Module]]] = WeakKeyDictionary()
_pass = _UncountedPass()


def _before_forward(module: nn.Module, args: Any) -> None:
    """Before layers that are right run in training mode, save them."""
    if torch.compiler.is_compiling():
        return
    if _pass.module is not None:
        _pass.depth += _pass.module() is module
        return
    layers = _below.get(module)
    if layers is None:
        layers = _below[module] = [ref(layer) for layer in _candidates([module]) if layer in _disabled]
    groups: dict[_Group, None] = {}
    for known in layers:
        layer = known()
        if layer is not None and layer.training:
            group = _disabled.get(layer)
            if group is not None and group.settled:
                groups[group] = None
    if not groups:
        return
    if torch.is_grad_enabled():
        for group in groups:
            group.snapshot.save()
            group.settled = False
        _watch_if_settled()
    else:
        # Statistics that were reset and then see passes without gradients are being estimated anew, as by torch.optim.swa_utils.update_bn.
        uncounted = [group for group in groups if not group.snapshot._has_changed()]
        if uncounted:
            _pass.begin(module, uncounted)


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    if _pass.module is not None and _pass.module() is module and not torch.compiler.is_compiling():
        if _pass.depth:
            _pass.depth -= 1
        else:
            _pass.give_up()


_watch = ModuleHooks(_before_forward, _after_forward)


def _watch_if_settled() -> None:
    if any(group.settled for group in _groups):
        _watch.install()
    else:
        _watch.remove()
