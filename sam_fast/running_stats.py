"""Which tensors of a model are running statistics.

They are found by name among the buffers, frozen parameters and plain attributes of every module; a user can name more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from itertools import islice
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from .backends.memory import is_plain

Models = nn.Module | Sequence[nn.Module]
"""A module, or a list or tuple of modules."""

ExtraBuffers = str | Iterable[str] | Callable[[str, Tensor], bool]
"""Which other buffers and frozen parameters to treat as running statistics.

Either one or more patterns (``*``, ``?`` and ``[...]`` are wildcards), which must match a qualified name, as in
``named_buffers()``, or the part of one after a dot: ``"weight_u"`` is every buffer of that name, ``"*.observer.*"``
everything inside any module called ``observer``. Or a function that takes the qualified name and the tensor and returns
True for those to include.
"""

CheckedBuffers = tuple[str, ...] | Callable[[str, Tensor], bool]

COUNTER = "num_batches_tracked"


@cache  # models are searched at every step
def is_statistic(name: str) -> bool:
    """Whether a buffer or frozen parameter of that name is a running statistic."""
    name = name.rpartition("/")[2]  # Keras' parameters are called by their paths
    return name.startswith(("running_", "moving_")) or name == COUNTER


def _keeps_statistics(module: nn.Module) -> bool:
    for name in module._buffers.keys():  # noqa: SIM118 - a scripted module's is no dict and cannot be iterated
        if is_statistic(name):
            return True
    for name in module._parameters.keys():  # noqa: SIM110, SIM118
        if is_statistic(name):
            return True
    return False


_ATTRIBUTES = frozenset(vars(nn.Module()))

MOST_ASIDE = 100
"""How many containers are searched for modules that a module keeps in plain attributes. Those of this length or more
are not: they are histories or data.
"""


@lru_cache(maxsize=1000)  # parametrized and traced modules have a class each
def _is_pytorchs(kind: type) -> bool:
    """Whether a class of modules, with all its bases, is PyTorch's. To parametrize or shard a module PyTorch derives a
    class from a user's: that says it is PyTorch's, too, but has the user's attributes.
    """
    return all(str(base.__module__).partition(".")[0] in ("torch", "abc", "builtins") for base in kind.__mro__)


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module; empty for PyTorch's own modules, where they do not matter."""
    if _is_pytorchs(type(module)):  # type: ignore[arg-type]  # a class can be hashed
        return {}
    attributes = vars(module).copy()
    return {name: attributes[name] for name in attributes if name not in _ATTRIBUTES}


def _modules_in(values: Iterable[Any]) -> list[nn.Module]:
    """The modules among ``values`` and in lists and the like among them. PyTorch does not see these as submodules."""
    found: list[nn.Module] = []
    pending: list[Any] = [list(values)]
    for value in islice(pending, MOST_ASIDE):  # which grows
        for item in list(value.values() if isinstance(value, dict) else value):
            kind = type(item)  # isinstance() would take a weakref.proxy for what it refers to
            if issubclass(kind, nn.Module):
                found.append(item)
            elif issubclass(kind, (list, tuple, set, dict)) and len(item) < MOST_ASIDE:
                pending.append(item)
    return found


def modules_aside(module: nn.Module) -> list[nn.Module]:
    """The modules that ``module`` itself keeps in plain lists and the like."""
    return _modules_in(_own_attributes(module).values())


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
            inside = type(model).__name__
            raise TypeError(f"{wanted}, got {type(models).__name__} that holds an object of type {inside}")
    return list(models)


def check_extra_buffers(extra_buffers: Any) -> CheckedBuffers:
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
        "extra_buffers must be names or patterns of buffers, such as ('weight_u', '*.observer.*'), or a function "
        f"(name, tensor) -> bool, got {extra_buffers!r}"
    )


def check_models(models: Any, extra_buffers: Any, argument: str) -> tuple[list[nn.Module], CheckedBuffers]:
    """``models`` and ``extra_buffers``, checked before anything is changed.

    Raises:
        TypeError: one of them is of the wrong type.
        ValueError: a pattern in ``extra_buffers`` fits nothing in ``models``.
    """
    found, extra = as_models(models, argument), check_extra_buffers(extra_buffers)
    if extra:
        find_layers(found, extra)
    return found, extra


class Layers(NamedTuple):
    """Modules that keep running statistics, and for some of them the names of further buffers that the user has
    named.
    """

    modules: list[nn.Module]
    extra: dict[nn.Module, frozenset[str]]


def find_layers(
    models: Iterable[nn.Module],
    extra_buffers: ExtraBuffers = (),
    seen: set[nn.Module] | None = None,
    every_pattern: bool = True,
) -> Layers:
    """The modules that keep statistics: every BatchNorm, SyncBatchNorm, InstanceNorm with tracking, custom layers, and
    Keras layers on torch.

    Args:
        models: where to look.
        extra_buffers: see :data:`ExtraBuffers`.
        seen: modules to leave out, with everything in them. The modules that were searched are added.
        every_pattern: whether every pattern must fit something.

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
        own = _own_attributes(module)
        if _keeps_statistics(module) or module in extra or (own and any(map(is_statistic, own))):
            found.append(module)
        if own:
            stack += _modules_in(own.values())
        if children := module._modules:
            stack.extend(child for child in children.values() if child is not None)
    return Layers(found, extra)


def _find_extra(
    models: list[nn.Module], wanted: CheckedBuffers, every_pattern: bool
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
            listed = ", ".join(map(repr, idle))
            raise ValueError(f"extra_buffers: nothing matches {listed}; model.named_buffers() lists the names")
    return found


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for owned in (buffers_of(module), FrozenParameters(module)):
        for name in owned:
            tensor = owned.get(name)
            if tensor is not None:
                yield name, tensor


# ---- The statistics of one module, by name ---------------------------------------------------------------------------


class _ByName:
    """The buffers of a module, also of a scripted one, with the part of a dict's interface that is used here."""

    _kind = "_buffers"

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)

    def __iter__(self) -> Iterator[str]:
        return iter(list(getattr(self._module(), self._kind, {}).keys()))

    def get(self, name: str) -> Tensor | None:
        return getattr(self._module(), name, None)

    def __setitem__(self, name: str, value: Tensor) -> None:
        setattr(self._module(), name, value)


class FrozenParameters(_ByName):
    """The parameters of a module that need no gradient, with the same interface. Keras on torch keeps its statistics
    there.
    """

    _kind = "_parameters"

    def get(self, name: str) -> Tensor | None:
        parameter = super().get(name)
        return None if parameter is None or parameter.requires_grad else parameter

    def __setitem__(self, name: str, value: Tensor) -> None:
        super().__setitem__(
            name, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )


class PlainTensors(_ByName):
    """The statistics in plain attributes of a module, as in hand-written norms, with the same interface."""

    def __iter__(self) -> Iterator[str]:
        module = self._module()
        names = () if module is None else _own_attributes(module)
        return iter([name for name in names if is_statistic(name) and self.get(name) is not None])

    def get(self, name: str) -> Tensor | None:
        module = self._module()
        value = None if module is None else vars(module).get(name)
        return value if isinstance(value, Tensor) and is_plain(value) else None

    def __setitem__(self, name: str, value: Tensor) -> None:
        vars(self._module())[name] = value


Untrained = dict[tuple[int, str], tuple[int, int, Tensor | None]]
"""By the position of the model and the name: the version and the address, which writing changes. For a buffer a copy,
too: DDP writes the same values again in every pass.
"""


def _untrained(
    models: Iterable[Any], param_groups: Iterable[dict[str, Any]]
) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """Weights that are not trained, such as a target network's, and buffers, such as a queue. Running statistics are
    left out, and so are the weights of an ``Embedding(max_norm=)``: it shortens them in every pass, whatever the others
    are.
    """
    modules = [model for model in models if isinstance(model, nn.Module)]
    embeddings = [m for model in modules for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    ignored = {id(m._parameters.get("weight")) for m in embeddings if m.max_norm is not None}  # .weight may compute one
    ignored |= {id(p) for group in param_groups for p in group["params"] if p.requires_grad}
    for index, module in enumerate(modules):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if id(tensor) in ignored or is_statistic(name.rpartition(".")[2]) or not is_plain(tensor):
                continue
            if not tensor.is_inference() and (tensor.is_floating_point() or not isinstance(tensor, nn.Parameter)):
                yield (index, name), tensor


def note_untrained(
    models: Iterable[Any], param_groups: Iterable[dict[str, Any]], extra_buffers: ExtraBuffers
) -> Untrained:
    """What :func:`warn_of_changed` compares with, without what ``extra_buffers`` names: that is put back."""
    models = list(models)
    extra = _find_extra(models, check_extra_buffers(extra_buffers), every_pattern=False) if extra_buffers else {}
    named = {id(getattr(module, name)) for module, names in extra.items() for name in names}
    return {
        key: (tensor._version, tensor.data_ptr(), None if isinstance(tensor, nn.Parameter) else tensor.detach().clone())
        for key, tensor in _untrained(models, param_groups)
        if id(tensor) not in named
    }


def warn_of_changed(
    before: Untrained, models: Iterable[Any], param_groups: Iterable[dict[str, Any]], stacklevel: int
) -> None:
    """Warn if the second pass has changed weights that are not trained, or buffers, as the first one does."""
    weights, buffers = [], []
    for key, tensor in _untrained(models, param_groups):
        version, address, copy = before.get(key, (tensor._version, tensor.data_ptr(), None))
        if (version, address) == (tensor._version, tensor.data_ptr()):
            continue
        if copy is None:
            weights.append(key[1])
        elif not torch.equal(tensor, copy):
            buffers.append(key[1])
    if weights:
        warnings.warn(
            f"both passes of SAM change weights that the optimizer does not train, {first_of(weights)}; the second "
            "does so while the others are w + e. Update a target network or an average of the weights once, after the "
            "step: in Lightning in on_train_batch_end, in Transformers in on_step_end. If they do not depend on the "
            "others, name them in extra_buffers: the second pass then leaves them as they were",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
    if buffers:
        warnings.warn(
            f"both passes of SAM change buffers, {first_of(buffers)}, and so they change twice in each step. Name them "
            "in extra_buffers: the second pass then leaves them as they were",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def first_of(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]


def owners_of(module: nn.Module, extra: frozenset[str]) -> list[Any]:
    """The collections in which a module holds statistics by name, and those named ``extra``."""
    owners = [buffers_of(module)]
    # a scripted module's dict cannot be iterated itself
    if any(is_statistic(name) or name in extra for name in module._parameters.keys()):  # noqa: SIM118
        owners.append(FrozenParameters(module))
    if any(is_statistic(name) for name in _own_attributes(module)):
        owners.append(PlainTensors(module))
    return owners


def buffers_of(module: nn.Module) -> Any:
    return module._buffers if isinstance(module._buffers, dict) else _ByName(module)
