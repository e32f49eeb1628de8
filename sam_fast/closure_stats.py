"""The second call of a closure: its forward passes count in no running statistics, whatever modules it calls."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from threading import get_ident
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

from torch import nn
from torch.nn.utils import stateless
from torch.optim import Optimizer

from .batchnorm import keep, save_layers
from .module_hooks import ModuleHooks
from .running_stats import CheckedBuffers, Models, as_models, find_layers
from .snapshot import BatchNormSnapshot

LIMIT = 300
"""How many objects are searched for what a closure refers to: a trainer may lead to everything there is. Hooks find the
rest.
"""

_COMPILED = "_torchdynamo_orig_callable"
_FUNCTIONAL_CALL: CodeType | None = getattr(getattr(stateless, "_functional_call", None), "__code__", None)

_warned: WeakSet[Any] = WeakSet()


@contextmanager
def uncounted_forwards(
    models: Models | None = None,
    extra_buffers: CheckedBuffers = (),
    closure: Callable[[], Any] | None = None,
) -> Iterator[None]:
    """Forward passes inside do not count in the running statistics of any module, however the body ends.

    Statistics are saved at the beginning for ``models`` and for modules that ``closure`` refers to, and for any other
    module, with everything in it, when it is called. They are put back at the end.

    Args:
        models: modules that may run without being called, as in a compiled function: a module, or a list or tuple of
            modules.
        extra_buffers: as in :func:`sam_fast.disable_running_stats`, but a pattern may match nothing.
        closure: what is called inside. If all it is seen to run is a compiled function in which no module is found, a
            warning asks for ``models``.
    """
    with ExitStack() as stack:
        second = _Uncounted(extra_buffers, stack)
        second.save([] if models is None else as_models(models, "step(closure, model=model)"))
        found, compiled = refers_to(closure)
        for module in found:
            if module not in second.seen:
                second.save([module])
        stack.callback(_end, ref(second))
        finalize(second, _hooks.update)  # in case an interruption keeps _end from running
        _active[second] = None
        _hooks.update()
        yield
        if compiled and models is None and not any(_has_tensors(module) for module in second.seen):
            _warn(compiled)


try:
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
except ImportError:  # not public: where it is gone, closures with torch.func.grad do without
    temporarily_clear_interpreter_stack = nullcontext  # type: ignore[assignment]


class _Uncounted:
    """What :func:`uncounted_forwards` has seen and saved so far."""

    def __init__(self, extra_buffers: CheckedBuffers, stack: ExitStack) -> None:
        self.seen: set[nn.Module] = set()
        self.thread = get_ident()  # others may train other models meanwhile
        self._extra_buffers = extra_buffers
        self._stack = stack

    def save(self, roots: list[nn.Module]) -> None:
        layers = find_layers(roots, self._extra_buffers, self.seen, every_pattern=False)
        if layers.modules:
            self._stack.callback(_put_back, roots, save_layers(roots, layers))

    def save_in_place(self, module: nn.Module) -> None:
        """For ``functional_call``, during which the module may hold the caller's own tensors. The second pass must not
        count in these either, but they must not be put into the module for good.
        """
        inside: set[nn.Module] = set()
        layers = find_layers([module], self._extra_buffers, inside, every_pattern=False)
        self.seen |= inside
        snapshot = BatchNormSnapshot._of_layers(layers, in_place=True)
        with temporarily_clear_interpreter_stack():  # within torch.func.grad new tensors have no memory
            snapshot.save()
        self._stack.callback(snapshot._restore_in_place)


def _before_forward(module: nn.Module, args: Any) -> None:
    for known in _active.keyrefs():
        second = known()
        if second is None or second.thread != get_ident():
            continue
        if _is_functional_call():
            second.save_in_place(module)
        elif module not in second.seen:
            second.save([module])


def _is_functional_call() -> bool:
    try:
        return sys._getframe(6).f_code is _FUNCTIONAL_CALL  # behind this one, two of the hook and three of nn.Module
    except ValueError:  # fewer frames: a thread that began with the module
        return False


# A dictionary, whose keyrefs() other threads cannot disturb.
_active: WeakKeyDictionary[_Uncounted, None] = WeakKeyDictionary()
_hooks = ModuleHooks(lambda: bool(_active.keyrefs()), _before_forward)


def _end(second: ref[_Uncounted]) -> None:
    _active.pop(second(), None)  # type: ignore[arg-type]
    _hooks.update()


def _put_back(roots: list[nn.Module], snapshot: BatchNormSnapshot) -> None:
    snapshot.restore()
    keep(roots, snapshot)


def _has_tensors(module: nn.Module) -> bool:
    return any(tensor is not None for owned in (module._parameters, module._buffers) for tensor in owned.values())


def _warn(compiled: Iterable[Any]) -> None:
    for function in compiled:
        original = getattr(function, _COMPILED)
        key = getattr(original, "__code__", original)
        if key not in _warned:
            _warned.add(key)
            name = getattr(original, "__qualname__", original)
            warnings.warn(
                f"step(closure) cannot see which modules the compiled function {name} runs: if they keep BatchNorm "
                "statistics, those of its second pass count too. Pass step(closure, model=model), where model may be a "
                "list of modules",
                RuntimeWarning,
                stacklevel=7,
            )


def refers_to(closure: Any) -> tuple[list[nn.Module], list[Any]]:
    """The modules and compiled functions that a closure leads to: through what it encloses, the globals it names, and
    objects' attributes.
    """
    modules: list[nn.Module] = []
    compiled: list[Any] = []
    queue, known = [closure], {id(closure)}
    for found in queue:  # which grows meanwhile
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
    # Copies: another thread may change them.
    if issubclass(kind, list | tuple | set):
        return list(islice(parent, LIMIT))
    if issubclass(kind, dict):
        return list(islice(parent.values(), LIMIT))
    if hasattr(kind, "__len__"):  # other containers, which may be large
        return ()
    if issubclass(kind, type | ModuleType | Optimizer) or _is_torchs(kind):
        return ()
    return gc.get_referents(parent)  # attributes, without running the object's code


def _is_torchs(found: Any) -> bool:
    """Whether ``found`` is one of PyTorch's functions or types."""
    return str(found.__module__).partition(".")[0] == "torch"


def _names(code: CodeType) -> dict[str, None]:
    """The names that a function, or a function inside it, may look up in its globals. Not a set, whose order differs
    between processes: all ranks must find the same objects within the limit.
    """
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
