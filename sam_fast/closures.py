"""The second call of a closure: its forward passes count in no running statistics, whatever modules it calls."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.utils import stateless
from torch.optim import Optimizer

from .batchnorm import keep, save_layers
from .module_hooks import ModuleHooks
from .running_stats import BatchNormSnapshot, ExtraBuffers, Models, as_models, check_extra_buffers, find_layers

LIMIT = 300
"""Objects that are looked at to find what a closure refers to: a trainer may lead to everything there is. Hooks find the rest."""

_COMPILED = "_torchdynamo_orig_callable"
_FUNCTIONAL_CALL: CodeType | None = getattr(getattr(stateless, "_functional_call", None), "__code__", None)

_warned: WeakSet[Any] = WeakSet()


@contextmanager
def uncounted_forwards(
    models: Models | None = None,
    extra_buffers: ExtraBuffers = (),
    closure: Callable[[], Any] | None = None,
) -> Iterator[None]:
    """Forward passes inside do not count in running statistics, whatever modules they are of and however the body ends.

    Statistics are saved at the beginning for ``models`` and for modules that ``closure`` refers to, and for every other module when it is
    called, with all that is in it. They are put back at the end.

    Args:
        models: what may run without that a module is called, as in a compiled function: a module, or a list or tuple of modules.
        extra_buffers: as in :func:`sam_fast.disable_running_stats`. Without ``models`` a pattern may fit nothing.
        closure: what is called inside. If all it is seen to run is a compiled function in which no module is found, a warning asks for ``models``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``models`` are given, and a pattern in ``extra_buffers`` fits nothing in them.
    """
    given = [] if models is None else as_models(models, "step(closure, model=model)")
    extra_buffers = check_extra_buffers(extra_buffers)
    seen: set[nn.Module] = set()
    with ExitStack() as stack:

        def save(roots: list[nn.Module], in_place: bool = False, every_pattern: bool = False) -> None:
            layers = find_layers(roots, extra_buffers, seen, every_pattern)
            if layers.modules:
                stack.callback(_put_back, roots, save_layers(roots, layers), in_place)

        def before_forward(module: nn.Module, args: Any) -> None:
            if module not in seen and not torch.compiler.is_compiling():
                save([module], in_place=_is_functional_call(sys._getframe(1)))

        if given:
            save(given, every_pattern=True)
        found, compiled = _refers_to(closure)
        for module in found:
            if module not in seen:
                save([module])
        hooks = ModuleHooks(before_forward)
        hooks.install()
        stack.callback(hooks.remove)
        yield
        if compiled and models is None and not any(module._parameters or module._buffers for module in seen):
            _warn(compiled)


def _put_back(roots: list[nn.Module], snapshot: BatchNormSnapshot, in_place: bool) -> None:
    if in_place:
        snapshot._restore_in_place()
    else:
        snapshot.restore()
        keep(roots, snapshot)


def _is_functional_call(frame: Any) -> bool:
    """Whether a module is called by torch.func.functional_call: it has its own buffers back when the call ends."""
    while frame is not None:
        if frame.f_code is _FUNCTIONAL_CALL:
            return True
        frame = frame.f_back
    return False


def _warn(compiled: Iterable[Any]) -> None:
    for function in compiled:
        original = getattr(function, _COMPILED)
        key = getattr(original, "__code__", original)
        if key not in _warned:
            _warned.add(key)
            warnings.warn(
                f"step(closure) cannot see which modules the compiled function {getattr(original, '__qualname__', original)} runs: if they keep "
                "BatchNorm statistics, those of its second pass count too. Pass step(closure, model=model), where model may be a list of modules",
                RuntimeWarning,
                stacklevel=7,
            )


def _refers_to(closure: Any) -> tuple[list[nn.Module], list[Any]]:
    """The modules and compiled functions that a closure leads to: through what it encloses, the globals it names, and objects' attributes."""
    modules: list[nn.Module] = []
    compiled: list[Any] = []
    queue, known = [closure], {id(closure)}
    for found in queue:  # which grows
        if issubclass(type(found), nn.Module):
            modules.append(found)
            continue
        if type(found) is FunctionType and _COMPILED in found.__dict__:
            compiled.append(found)
        for child in _children(found):
            if id(child) not in known and len(known) < LIMIT and gc.is_tracked(child):
                known.add(id(child))
                queue.append(child)
    return modules, compiled


def _children(parent: Any) -> Iterable[Any]:
    kind = type(parent)
    if kind is FunctionType:
        if _COMPILED in parent.__dict__:
            return (parent.__dict__[_COMPILED],)
        if _is_torchs(parent):
            return ()
        named = (parent.__globals__.get(name) for name in _names(parent.__code__))
        return (*(parent.__closure__ or ()), parent.__defaults__, parent.__kwdefaults__, parent.__dict__, *named)
    if kind in (list, tuple, set):
        return islice(parent, LIMIT)
    if kind is dict:
        return islice(parent.values(), LIMIT)
    if issubclass(kind, type | ModuleType | Optimizer) or _is_torchs(kind):
        return ()
    return gc.get_referents(parent)  # attributes, without running any code of theirs


def _is_torchs(found: Any) -> bool:
    """Whether it is a function or type of PyTorch's."""
    return str(found.__module__).partition(".")[0] == "torch"


def _names(code: CodeType) -> set[str]:
    """What a function may look up in its globals, functions inside it included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
