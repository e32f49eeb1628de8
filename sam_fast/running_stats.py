"""Running statistics: which tensors of a model they are, and a copy of them that can be put back.

They are found by name among the buffers and frozen parameters of every module; a user can name more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from operator import is_
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from .backends import Backend, choose
from .bucket import Bucket

Models = nn.Module | Sequence[nn.Module]
"""A module, or a list or tuple of modules."""

ExtraBuffers = str | Iterable[str] | Callable[[str, Tensor], bool]
"""Names what else is to be treated as running statistics, among all buffers and frozen parameters.

Either one or more patterns (``*``, ``?`` and ``[...]`` are wildcards), which must fit a qualified name, as in ``named_buffers()``, or what
follows one of its dots: ``"weight_u"`` is every buffer of that name, ``"*.observer.*"`` everything inside any module called ``observer``. Or a
function that takes the qualified name and the tensor and returns True for those that are meant.
"""


_COUNTER = "num_batches_tracked"


def _is_statistic(name: str) -> bool:
    name = name.rpartition("/")[2]  # Keras' parameters are called by their paths
    return name.startswith(("running_", "moving_")) or name == _COUNTER


class _Names(dict[str, bool]):
    """For each name whether it is a statistic's, asked for once: models are walked in every step."""

    def __missing__(self, name: str) -> bool:
        self[name] = found = _is_statistic(name)
        return found


_names = _Names()


def _keeps_statistics(module: nn.Module) -> bool:
    for name in module._buffers.keys():  # noqa: SIM118 - a scripted module's is no dict and cannot be iterated
        if _names[name]:
            return True
    for name in module._parameters.keys():  # noqa: SIM110, SIM118
        if _names[name]:
            return True
    return False


def as_models(models: Any, argument: str) -> list[nn.Module]:
    """``models`` as a list.

    Raises:
        TypeError: it is neither a module nor a list or tuple of modules.
    """
    if isinstance(models, nn.Module):
        return [models]
    wanted = f"{argument} must be a torch.nn.Module, or a list or tuple of them"
    if not isinstance(models, list | tuple):
        raise TypeError(f"{wanted}, got an object of type {type(models).__name__}")
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{wanted}, got a {type(models).__name__} that holds an object of type {type(model).__name__}")
    return list(models)


def check_extra_buffers(extra_buffers: Any) -> tuple[str, ...] | Callable[[str, Tensor], bool]:
    """``extra_buffers`` as a tuple of patterns, or the function that it is.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(extra_buffers, str):
        return (extra_buffers,)
    if isinstance(extra_buffers, Iterable):
        patterns = tuple(extra_buffers)
        if all(isinstance(pattern, str) for pattern in patterns):
            return patterns
    elif callable(extra_buffers):
        return extra_buffers  # type: ignore[no-any-return]
    raise TypeError(
        "extra_buffers must be names or patterns of buffers, such as ('weight_u', '*.observer.*'), or a function (name, tensor) -> bool, "
        f"got {extra_buffers!r}"
    )


def check_models(models: Any, extra_buffers: Any, argument: str) -> tuple[list[nn.Module], tuple[str, ...] | Callable[[str, Tensor], bool]]:
    """Both, checked, before anything is changed.

    Raises:
        TypeError: one of them is of the wrong type.
        ValueError: a pattern in ``extra_buffers`` fits nothing in ``models``.
    """
    found, extra = as_models(models, argument), check_extra_buffers(extra_buffers)
    if extra:
        find_layers(found, extra)
    return found, extra


class Layers(NamedTuple):
    """Modules that keep running statistics, and for some of them the names of further buffers that the user has named."""

    modules: list[nn.Module]
    extra: dict[nn.Module, frozenset[str]]


def find_layers(
    models: Iterable[nn.Module], extra_buffers: ExtraBuffers = (), seen: set[nn.Module] | None = None, every_pattern: bool = True
) -> Layers:
    """The modules that keep statistics: every BatchNorm, SyncBatchNorm, InstanceNorm with tracking, custom ones, Keras' on torch.

    Args:
        models: where to look.
        extra_buffers: see :data:`ExtraBuffers`.
        seen: modules that are left out with all that is in them; those that were looked at are added.
        every_pattern: every pattern must fit something.

    Raises:
        TypeError: ``extra_buffers`` is of the wrong type.
        ValueError: a pattern in it fits nothing.
    """
    roots = list(models)
    wanted = check_extra_buffers(extra_buffers)
    extra = _find_extra(roots, wanted, every_pattern) if wanted else {}
    seen = set() if seen is None else seen
    found, stack = [], roots[::-1]
    while stack:
        module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        if _keeps_statistics(module) or module in extra:
            found.append(module)
        if children := module._modules:
            stack.extend(child for child in children.values() if child is not None)
    return Layers(found, extra)


def _find_extra(
    models: list[nn.Module], wanted: tuple[str, ...] | Callable[[str, Tensor], bool], every_pattern: bool
) -> dict[nn.Module, frozenset[str]]:
    found: dict[nn.Module, frozenset[str]] = {}
    fitting: set[str] = set()
    for model in models:
        for path, module in model.named_modules():
            names = set()
            for name, tensor in _named_tensors(module):
                qualified = f"{path}.{name}" if path else name
                if isinstance(wanted, tuple):
                    fit = [pattern for pattern in wanted if fnmatchcase(f".{qualified}", f"*.{pattern}")]
                    fitting.update(fit)
                    chosen = bool(fit)
                else:
                    chosen = bool(wanted(qualified, tensor))
                if chosen:
                    names.add(name)
            if names:
                found[module] = found.get(module, frozenset()) | names
    if isinstance(wanted, tuple) and every_pattern:
        idle = [pattern for pattern in wanted if pattern not in fitting]
        if idle:
            raise ValueError(f"extra_buffers: nothing fits {', '.join(map(repr, idle))}; model.named_buffers() lists the names")
    return found


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for owned in (_buffers_of(module), _FrozenParameters(module)):
        for name in owned:
            tensor = owned.get(name)
            if tensor is not None:
                yield name, tensor


# ---- The statistics of one module, by name ----------------------------------------------------------------------------------------------------


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


class _FrozenParameters:
    """The parameters of a module that need no gradient, with the same interface. Keras on torch keeps statistics as such."""

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)

    def __iter__(self) -> Iterator[str]:
        module = self._module()
        return iter([] if module is None else list(module._parameters.keys()))

    def get(self, name: str) -> Tensor | None:
        parameter: Tensor | None = getattr(self._module(), name, None)
        return None if parameter is None or parameter.requires_grad else parameter

    def __setitem__(self, name: str, value: Tensor) -> None:
        setattr(self._module(), name, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False))


def _buffers_of(module: nn.Module) -> Any:
    return module._buffers if isinstance(module._buffers, dict) else _ScriptedBuffers(module)


def _is_transformed(tensor: Tensor) -> bool:
    """Whether it stands for another one inside a torch.func transform, and has no memory of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class BatchNormSnapshot:
    """A copy of all running statistics of ``model``, taken and put back in one fused call per device and dtype.

    Covered are the buffers and frozen parameters named ``running_*``, ``moving_*`` and ``num_batches_tracked`` (also as the last part of a
    path, ``norm/moving_mean``) of every module that ``model`` has when the snapshot is made, and those that ``extra_buffers`` names. Modules
    without statistics, in evaluation mode or lazy and not yet run are left as they are.

    Args:
        model: any module, or a list or tuple of modules. None is kept alive.
        extra_buffers: what else to copy; see :data:`sam_fast.running_stats.ExtraBuffers`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a pattern in ``extra_buffers`` fits nothing.
    """

    def __init__(self, model: Models, extra_buffers: ExtraBuffers = ()) -> None:
        self._use(find_layers(as_models(model, "BatchNormSnapshot(model)"), extra_buffers))

    @classmethod
    def _of_layers(cls, layers: Layers) -> BatchNormSnapshot:
        snapshot = cls.__new__(cls)
        snapshot._use(layers)
        return snapshot

    def _use(self, layers: Layers) -> None:
        # Weak: a layer may have a hook that leads to its model, and snapshots are kept for reuse.
        self._layers = [ref(layer) for layer in layers.modules]
        self._extra = [layers.extra.get(layer, frozenset()) for layer in layers.modules]
        self._owned: list[Any] = []
        self._layer_of: list[int] = []  # for each of them the index of its layer
        for index, layer in enumerate(layers.modules):
            owned = [_buffers_of(layer)]
            if any(_names[name] or name in self._extra[index] for name in layer._parameters.keys()):  # noqa: SIM118 - see _keeps_statistics
                owned.append(_FrozenParameters(layer))
            self._owned += owned
            self._layer_of += [index] * len(owned)
        self._names: list[tuple[str, ...]] = []
        self._places: list[tuple[Any, str]] = []
        self._place_layers: list[int] = []
        self._tensors: list[Tensor | None] = []
        self._versioned: list[Tensor] = []
        self._versions: list[int] = []
        self._buckets: list[Bucket] = []
        self._saved = False

    def _covers(self, layers: Layers) -> bool:
        """True if these are the snapshot's layers."""
        return (
            len(layers.modules) == len(self._layers)
            and all(known() is layer for known, layer in zip(self._layers, layers.modules, strict=True))
            and ([layers.extra.get(layer, frozenset()) for layer in layers.modules] == self._extra if layers.extra else not any(self._extra))
        )

    def save(self) -> None:
        """Copy the statistics. A second ``save`` replaces the first."""
        if not (self._is_unchanged() and all(bucket.backend.save(bucket) for bucket in self._buckets)):
            self._build()
            for bucket in self._buckets:
                bucket.backend.save(bucket)
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
                bucket.backend.restore(bucket, release=False)
            except RuntimeError:
                if not _reshape(bucket):
                    raise
            if bucket.empty_rows:  # the kernels pass them over
                _reshape(bucket)
        # Autograd may have saved a statistic that a layer changed in place: it must notice that the value is gone. PyTorch's own layers change
        # theirs without a new version, since their backward does not need them.
        versions = [t._version for t in self._versioned]
        if versions != self._versions:
            increment_version([t for t, old, new in zip(self._versioned, self._versions, versions, strict=True) if old != new])
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

        PyTorch's BatchNorm gives a new version to nothing but its counter when it runs; other layers, and compiled ones,
        to all that they change. ``counters=False`` leaves counters out.
        """
        if not self._is_unchanged():
            return True
        left_out = set() if counters else {id(t) for (_, name), t in zip(self._places, self._tensors, strict=True) if name == _COUNTER}
        return any(t._version != old and id(t) not in left_out for t, old in zip(self._versioned, self._versions, strict=True))

    def _look_up(self) -> list[Tensor | None]:
        return [owned.get(name) for owned, name in self._places]

    def _is_unchanged(self) -> bool:
        """True if the layers have the same statistics, by name and object, as when the buckets were built."""
        return self._names == [tuple(owned) for owned in self._owned] and all(map(is_, self._look_up(), self._tensors))

    def _build(self) -> None:
        self._names = [tuple(owned) for owned in self._owned]
        self._places, self._place_layers = [], []
        for index, owned, names in zip(self._layer_of, self._owned, self._names, strict=True):
            places = [(owned, name) for name in names if _names[name] or name in self._extra[index]]
            self._places += places
            self._place_layers += [index] * len(places)
        # A lazy buffer becomes a real one without becoming another object: remembered as None, it is looked at again next time.
        self._tensors = [None if t is None or is_lazy(t) or _is_transformed(t) else t for t in self._look_up()]
        members: dict[tuple[torch.device, torch.dtype, Backend], list[Tensor]] = {}
        seen: set[int] = set()
        for tensor in self._tensors:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                members.setdefault((tensor.device, tensor.dtype, choose(tensor, arithmetic=False)), []).append(tensor)
        self._versioned = [row for rows in members.values() for row in rows if not row.is_inference()]
        self._buckets = [Bucket(rows, [0] * len(rows), backend) for (_, _, backend), rows in members.items()]

    def _put_back(self, chosen: Iterable[int], replaced_only: bool) -> None:
        """Put statistics back one by one: where a layer now has another tensor under the name, and for some layers only.

        A layer that assigns new tensors gets its old one back: the new one may be needed by its backward. A layer that was moved to another
        device or dtype gets a new one there with the old values.
        """
        backups = {id(row): backup for bucket in self._buckets for row, backup in zip(bucket.rows, bucket.flat_rows, strict=True)}
        chosen = set(chosen)
        for (owned, name), index, old in zip(self._places, self._place_layers, self._tensors, strict=True):
            new = owned.get(name)
            if old is None or new is None or index not in chosen or (replaced_only and new is old):
                continue
            if (new.device, new.dtype) == (old.device, old.dtype):
                _copy_back(old, backups[id(old)])
                owned[name] = old
            else:
                owned[name] = backups[id(old)].to(new.device, new.dtype, copy=True)


def _copy_back(row: Tensor, backup: Tensor) -> None:
    if row.shape != backup.shape:
        with torch.no_grad():
            row.resize_(backup.shape)
    row.data.copy_(backup)


def _reshape(bucket: Bucket) -> bool:
    """Give rows that were resized in place, as observers do, their old shapes and values. False if there are none."""
    resized = [(row, backup) for row, backup in zip(bucket.rows, bucket.flat_rows, strict=True) if row.shape != backup.shape]
    for row, backup in resized:
        _copy_back(row, backup)
    return bool(resized)
