"""Keeping BatchNorm statistics right: SAM's second forward pass runs at ``w + e``, and must not count.

The statistics are copied before the second pass and copied back after it. Unlike setting ``momentum`` to 0 or
``track_running_stats`` to False this keeps ``num_batches_tracked`` right, survives NaN batches, works for any layer
that keeps statistics, and changes no attribute of any module, so ``torch.compile`` has nothing to recompile.

Statistics that were disabled and not enabled again are put back when a SAM step ends, so that evaluation and
checkpoints see the first passes alone. The layers stay disabled. Until they run again, the values in them are right,
whoever wrote them (a checkpoint may be loaded). A hook on all modules, installed only while it is needed, saves these
values just before the layers run.

Several threads may train a model each. The end of a step settles the layers that its own thread has disabled or was the
last to run. In whatever thread it ends, it also settles those of models that have its parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident, local
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, finalize, ref

import torch
from torch import nn

from .gradients import BEFORE, are_new, mark_used
from .module_hooks import ModuleHooks
from .running_stats import ExtraBuffers, Layers, Models, as_models, find_layers
from .snapshot import BatchNormSnapshot
from .step_state import StepState


class _Group:
    """Layers that one call has disabled."""

    def __init__(self, models: list[nn.Module], snapshot: BatchNormSnapshot) -> None:
        self.snapshot = snapshot
        self._models = list(map(ref, models))
        self.settled = False  # the layers hold the right statistics; False: the snapshot does
        self.fresh = False  # settled ever since it was disabled: the snapshot is right unless something was loaded
        self.partial = False  # some of the layers were enabled again
        self.of_step = False  # disabled in the step that is under way, for its second pass
        self.thread = get_ident()
        self.has_extra = any(snapshot._extra)
        self._momenta = self._momenta_now()
        self._params: frozenset[int] | None = None  # ids, since somebody has asked
        finalize(self, _watch.update).atexit = False

    def _momenta_now(self) -> list[Any]:
        return [getattr(layer(), "momentum", None) for layer in self.snapshot._layers]

    def _params_of_models(self) -> Iterator[nn.Parameter]:
        models = (known() for known in self._models)
        return (p for model in models if model is not None for p in model.parameters())

    def is_of(self, params: set[int]) -> bool:
        """Whether one of the parameters with these ids is in the models for which the layers were disabled."""
        return any(id(p) in params for p in self._params_of_models())

    def trains(self, params: set[int]) -> bool:
        """Whether one of the parameters with these ids leads to :meth:`run_unseen`: asked for every group that was left
        disabled, when any SAM step ends.
        """
        if self._params is None:
            self._params = frozenset(map(id, self._all_trained()))
        return not self._params.isdisjoint(params)

    def _all_trained(self) -> list[nn.Parameter]:
        layers = self.layers()
        bare = [layer for layer in layers if not any(p is not None for p in layer._parameters.values())]
        return [*self._trained_with(layers), *self._trained_with(bare)]

    def _trained_with(self, layers: Collection[nn.Module]) -> list[nn.Parameter]:
        """The parameters of layers; where they have none (affine=False), those of the models they are in."""
        params = [p for layer in layers for p in layer._parameters.values() if p is not None]
        if layers and not params:
            params = [*self._params_of_models()]
        return params

    def reestimates(self) -> bool:
        """Whether the momentum was changed or the saved statistics were reset: passes without gradients then count.

        torch.optim.swa_utils.update_bn and precise BatchNorm do that.
        """
        return self._momenta != self._momenta_now() or self.snapshot._has_changed()

    def layers(self) -> dict[nn.Module, frozenset[str]]:
        """The layers that are still disabled, with the names of further buffers that the user has named."""
        pairs = zip(self.snapshot._layers, self.snapshot._extra, strict=True)
        known = ((layer(), names) for layer, names in pairs)
        return {layer: names for layer, names in known if layer is not None and _disabled.get(layer) is self}

    def put_back(self, layers: Collection[nn.Module]) -> None:
        if len(layers) == len(self.snapshot._layers):
            self.snapshot.restore()
        elif layers:
            self.snapshot._restore_layers(layers)

    def begin_settled(self) -> None:
        """Note that the layers were disabled between steps: gradients that are there come from earlier passes."""
        self.settle()
        self.fresh = True
        mark_used((p.grad for p in self._all_trained() if p.grad is not None), BEFORE)

    def settle(self) -> None:
        """Note that what the layers hold is right."""
        self.settled, self.fresh, self.of_step, self._params = True, False, False, None
        if self.partial:
            layers = self.layers()
            self.snapshot = BatchNormSnapshot._of_layers(Layers([*layers], layers))
            self.snapshot.save()
            self._momenta = self._momenta_now()
            self.partial = False

    def run_unseen(self, layers: Collection[nn.Module], trained: set[int] | None = None) -> Collection[nn.Module]:
        """Those of the settled ``layers`` that seem to have run where no hook is called, as in a compiled function.

        Gradients show that a layer has run. If the group is fresh and at most its counters have changed, this returns
        all layers: putting them back does no harm.

        Args:
            layers: layers that are or were in the group.
            trained: ids of the parameters whose gradients count; None means all.
        """
        if self.fresh and not self.snapshot._has_changed(counters=False):
            return layers
        running = [layer for layer in layers if layer.training]
        grads = (p.grad for p in self._trained_with(running) if trained is None or id(p) in trained)
        ran = any(grad is not None and are_new([grad]) and are_new([grad], BEFORE) for grad in grads)
        return running if ran else []


# The layers that disable_running_stats was called for. A group lives as long as one of its layers.
_disabled: WeakKeyDictionary[nn.Module, _Group] = WeakKeyDictionary()
_known: WeakKeyDictionary[_Group, None] = WeakKeyDictionary()
# Snapshots that are not in use, kept so that a training loop builds its snapshot once.
_spare: WeakKeyDictionary[nn.Module, BatchNormSnapshot] = WeakKeyDictionary()


def _groups() -> list[_Group]:
    """All groups. keyrefs() is safe while other threads add some."""
    return [group for known in _known.keyrefs() if (group := known()) is not None]


def save_layers(models: list[nn.Module], layers: Layers) -> BatchNormSnapshot:
    """Save ``layers`` in a snapshot and return it. Reuses the one that was kept for ``models`` if it fits."""
    snapshot = _spare.pop(models[0], None) if models else None
    if snapshot is None or not snapshot._covers(layers):
        snapshot = BatchNormSnapshot._of_layers(layers)
        _below.clear()  # there may be modules that it does not know
    snapshot.save()
    return snapshot


def keep(models: list[nn.Module], snapshot: BatchNormSnapshot) -> None:
    """Keep a snapshot that is no longer in use for the next :func:`save_layers`."""
    if models:
        _spare[models[0]] = snapshot


def disable_running_stats(model: Models, extra_buffers: ExtraBuffers = ()) -> None:
    """Until :func:`enable_running_stats`, forward passes of ``model`` do not count in its running statistics.

    The statistics are saved now. They are put back when a SAM step ends, or by :func:`enable_running_stats` if that
    comes first. A layer that is already disabled keeps what was saved first. Statistics that are loaded or reset
    between the end of a step and the next forward pass are kept.

    Args:
        model: a module, or a list or tuple of modules.
        extra_buffers: names of further buffers to save (``"weight_u"``, ``"*.observer.*"``), or a function that takes
            a qualified name and a tensor and returns a bool. See
            :data:`sam_fast.running_stats.ExtraBuffers`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a pattern in ``extra_buffers`` matches nothing.
    """
    models = as_models(model, "disable_running_stats(model)")
    layers = find_layers(models, extra_buffers)
    here = get_ident()
    if _disabled:
        for layer in layers.modules:
            if (known := _disabled.get(layer)) is not None:
                known.thread = here
        layers = Layers([layer for layer in layers.modules if layer not in _disabled], layers.extra)
    if layers.modules:
        group = _Group(models, save_layers(models, layers))
        _disabled.update((layer, group) for layer in layers.modules)
        _known[group] = None
        if layers.extra:
            _below.clear()
        steps = (step() for step in _steps.keyrefs())
        if any(step is not None and step.active and step.thread == here for step in steps):  # its second pass follows
            group.of_step = True
        else:
            group.begin_settled()
            _watch.update()


def enable_running_stats(model: Models) -> None:
    """Undo :func:`disable_running_stats` for the layers of ``model``, and put their statistics back.

    Layers that are not disabled are left alone. ``model`` may be the model that was disabled, a wrapper of it, a part
    of it, or a list of modules.

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
        if not group.settled:
            group.put_back(layers)
        elif group.fresh:
            group.put_back(group.run_unseen(layers))
        if len(layers) == len(group.snapshot._layers):
            keep(models, group.snapshot)
            _known.pop(group, None)
        else:
            group.partial = True
            if group.settled:
                group.settle()
    _watch.update()


def _candidates(models: list[nn.Module]) -> Iterable[nn.Module]:
    """The modules in ``models`` that may be disabled: those with statistics. If a user has named further buffers, whose
    names are not known here, all modules that are disabled.
    """
    seen: set[nn.Module] = set()
    layers = find_layers(models, seen=seen).modules
    if any(group.has_extra for group in _groups()):
        return [module for module in seen if module in _disabled]
    return layers


@contextmanager
def frozen_running_stats(model: Models, extra_buffers: ExtraBuffers = ()) -> Iterator[None]:
    """Forward passes inside do not count in the running statistics of ``model``, however the body ends. May be nested.

    Args:
        model: a module, or a list or tuple of modules.
        extra_buffers: as in :func:`disable_running_stats`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a pattern in ``extra_buffers`` matches nothing.
    """
    models = as_models(model, "frozen_running_stats(model)")
    layers = find_layers(models, extra_buffers)
    disabled = {_disabled.get(layer) for layer in layers.modules} if _disabled else ()
    settled = {group: group.reestimates() for group in disabled if group and group.settled and not group.has_extra}
    snapshot = save_layers(models, layers)
    try:
        yield
    finally:
        snapshot.restore()
        keep(models, snapshot)
        # What disabled layers hold is right again, and so is what is loaded into them from now on.
        for group, changed in settled.items():
            if not group.settled and {*group.layers()} <= {*layers.modules}:
                if not changed:
                    group.snapshot._note_versions()
                group.settle()
                _watch.update()


# ---- Steps of SAM ----------------------------------------------------------------------------------------------------

_steps: WeakKeyDictionary[StepState, None] = WeakKeyDictionary()


def watch_steps(state: StepState) -> None:
    """Register an optimizer, whose ``state`` says when one of its steps is under way."""
    _steps[state] = None


def settle_running_stats(param_groups: Iterable[dict[str, Any]], counts: bool = False) -> None:
    """Put back the statistics of disabled layers at the end of a SAM step. The layers stay disabled.

    Args:
        param_groups: those of the optimizer. Their parameters have the gradients of the second pass.
        counts: that pass was the only one of the step, so the statistics that it has left in the layers are right.
    """
    if not _disabled:
        return
    _pass.give_up()
    here = get_ident()
    groups = _groups()
    trained: set[int] = set()
    if any(group.settled or group.thread != here for group in groups):
        trained = {id(p) for param_group in param_groups for p in param_group["params"]}
    for group in groups:
        # Another thread's model. If it is this step's model, the step has changed threads.
        if group.thread != here and not group.is_of(trained):
            continue
        if group.settled:
            if group.fresh or group.trains(trained):
                group.put_back(group.run_unseen(group.layers(), trained))
            continue
        if not (counts and group.of_step):
            if group.partial:
                group.put_back(group.layers())
            else:
                group.snapshot.restore()
        group.settle()
    _watch.update()


# ---- Forward passes of layers that are disabled ----------------------------------------------------------------------


class _UncountedPass(local):
    """A forward pass of this thread through disabled layers, in training mode but without gradients. What it does to
    the statistics is undone as soon as it ends.
    """

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
            group.put_back(group.layers())


# For each module that was called, the layers in it that may be disabled.
_below: WeakKeyDictionary[nn.Module, list[ReferenceType[nn.Module]]] = WeakKeyDictionary()
_pass = _UncountedPass()


def _before_forward(module: nn.Module, args: Any) -> None:
    """Save the statistics of the layers in ``module`` if they are right and about to change."""
    if _pass.module is not None:
        _pass.depth += _pass.module() is module
        return
    if not module.training:  # in evaluation; the hook also sees the call of a layer in it that trains
        return
    layers = _below.get(module)
    if layers is None:
        layers = _below[module] = [ref(layer) for layer in _candidates([module])]
    if not layers:
        return
    training = (layer for known in layers if (layer := known()) is not None and layer.training)
    groups = [group for group in dict.fromkeys(map(_disabled.get, training)) if group is not None and group.settled]
    if not groups:
        return
    if torch.is_grad_enabled():
        for group in groups:
            group.snapshot.save()
            group.settled, group.thread = False, get_ident()
        _watch.update()
    else:
        uncounted = [group for group in groups if not group.reestimates()]
        if uncounted:
            _pass.begin(module, uncounted)


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    if _pass.module is not None and _pass.module() is module:
        if _pass.depth:
            _pass.depth -= 1
        else:
            _pass.give_up()


_watch = ModuleHooks(lambda: any(group.settled for group in _groups()), _before_forward, _after_forward)
