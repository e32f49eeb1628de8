"""The base optimizer's own step, where restoring and stepping are not one pass: what surrounds ``base.step()``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from .backends.columns import local_tensor
from .backends.memory import is_dense
from .batchnorm import settle_running_stats
from .options import and_inner
from .rounding import ROUNDED
from .steps import RULE_OF

FUSED_ON_CPU = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
"""Optimizers whose ``fused=True`` walks over memory on the CPU as if parameters had no gaps, and gradients and
state lay as they do (PyTorch 2.10 to 2.15).
"""

WRONG_IN_16_BITS = (torch.optim.SGD,) if torch.__version__ < (2, 14) else ()  # type: ignore[operator]
"""Those of them whose values are wrong in 16 bits, too."""

PLAIN_ZERO_GRAD = Optimizer.zero_grad
"""As PyTorch has it: tools put others into the class."""

profiling: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)
"""Whether a profiler is to see what is called."""


def maximizes(base: Optimizer) -> bool:
    """Whether an optimizer maximizes where its groups do not say: pytorch_optimizer's keep it to themselves."""
    said = (getattr(optimizer, "maximize", False) for optimizer in and_inner(base))
    return any(bool(value) and not callable(value) for value in said)


class BaseStep:
    """Calls ``base.step()`` so that hooks run once, and entries that somebody else keeps in its state do no harm.

    PyTorch's optimizers take a state that is not empty for one of their own. What SAM's users keep in
    ``optimizer.state[p]`` before the base optimizer's first step with p is set aside for that step. But they may also
    put the base optimizer's own state there, restored by name or made for a parameter that has grown: the names tell.

    A loop may also call ``base.step()``, as in a warm-up, and so may a variant of SAM in a ``second_step`` of its own.
    Hooks do the same for that, and put back what is disabled in BatchNorm layers, as at the end of SAM's step.

    Args:
        base: the base optimizer.
        perturbation: that of the SAM, which is restored before its step.
    """

    def __init__(self, base: Optimizer, perturbation: Any) -> None:
        self._foreign: set[str] = set()  # names of entries that are not the base optimizer's
        self._aside: dict[Tensor, dict[str, Any]] = {}
        self._called = False
        self._perturbation = ref(perturbation)
        self.look_at(base)
        _unhook_dead(base)
        # not by the methods that register: their handles need what not every wrapper's dictionaries have
        base._optimizer_step_pre_hooks[self] = self._before_alone  # type: ignore[index]
        base._optimizer_step_post_hooks[self] = self._after_alone  # type: ignore[index]

    def __getstate__(self) -> dict[str, Any]:
        """A copy is made where a base optimizer copies its hooks, too. It belongs to no SAM and knows no parameters."""
        return {**vars(self), "_perturbation": type(None), "_state": None}

    def look_at(self, base: Optimizer) -> None:
        """What is in the state of ``base`` now is its own, but for what is known not to be."""
        self._state = base.state
        entries = ((p, entry) for p, entry in base.state.items() if isinstance(p, Tensor))  # MADGRAD counts in one more
        self._initialised = {id(p) for p, entry in entries if _names_of(entry) - self._foreign}
        self._entries = len(base.state)

    def adopt(self, base: Optimizer, params: Iterable[Tensor]) -> None:
        """The state that ``base`` has made of new parameters, outside its step, is its own."""
        self._initialised.update(id(p) for p in params if _names_of(base.state.get(p, {})))

    def __call__(self, base: Optimizer) -> None:
        """Step."""
        self._before(base)
        try:
            self._called = True
            with _as_fused_on_cpu_expects(base):
                _step_of(base)()
        finally:
            self._called = False
            self._after(base)

    def _before_alone(self, base: Optimizer, *_: Any) -> None:
        if self._called:
            return
        perturbation = self._perturbation()
        if perturbation is not None and perturbation.active:
            raise RuntimeError(
                "base_optimizer.step() between first_step() and second_step() would step from w + e: call "
                "second_step() instead, or restore() before it. There is no state[p]['old_p'] to put back by hand"
            )
        settle_running_stats(base.param_groups)
        self._before(base)

    def _after_alone(self, base: Optimizer, *_: Any) -> None:
        if not self._called:
            self._after(base)

    def _before(self, base: Optimizer) -> None:
        if base.state is not self._state:  # loaded
            self._aside = {}
            self.look_at(base)
        elif self._aside:  # of a step alone that has raised
            self._after(base)
        if self._foreign or len(base.state) != self._entries:
            self._set_aside(base)

    def _after(self, base: Optimizer) -> None:
        aside = self._aside
        for p, entry in aside.items():
            base.state[p] |= entry
        self._aside = {}  # here, so that whatever interrupts this loses nothing
        if aside or len(base.state) != self._entries:
            self.look_at(base)

    def _set_aside(self, base: Optimizer) -> None:
        cls: Any = type(base)
        rule = RULE_OF[cls]
        names = _names_in(cls) - base.defaults.keys() if rule is None else rule.all_names
        for p, entry in base.state.items():
            if not isinstance(p, Tensor) or not isinstance(entry, dict) or not entry:
                continue
            its_own = not entry.keys().isdisjoint(names) or (rule is None and id(p) in self._initialised)
            if not its_own:
                self._foreign |= entry.keys()
                self._aside[p] = dict(entry)
                entry.clear()


def reset_gradients(base: Optimizer, set_to_none: bool) -> None:
    """``base.zero_grad()``; where it is PyTorch's own, in half the time."""
    if not set_to_none:
        base.zero_grad(False)
    elif getattr(base.zero_grad, "__func__", None) is not PLAIN_ZERO_GRAD or profiling():
        base.zero_grad()  # one of somebody's own may take nothing
    else:
        for group in base.param_groups:
            for p in group["params"]:
                p.grad = None


def is_schedulers(step: Any, optimizer: Optimizer) -> bool:
    """Whether the ``step`` that somebody has put on an optimizer is a learning rate scheduler's, which does nothing but
    note in ``_opt_called`` that it was called.
    """
    return hasattr(step, "_wrapped_by_lr_sched") and getattr(step, "__wrapped__", None) is type(optimizer).step


def has_hooks(base: Optimizer) -> bool:
    """Whether a base optimizer has step hooks other than a SAM's."""
    keys: list[Any] = [*base._optimizer_step_pre_hooks, *base._optimizer_step_post_hooks]
    return any(type(key) is not BaseStep for key in keys)


def _unhook_dead(base: Optimizer) -> None:
    """Take the hooks of SAMs that are gone from a base optimizer. Not when they go, which may be in the middle of its
    step, as the garbage collector pleases.
    """
    dictionaries: list[Any] = [base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks]
    for hooks in dictionaries:
        for key in list(hooks):
            if isinstance(key, BaseStep) and key._perturbation() is None:
                del hooks[key]


def _names_of(entry: Any) -> set[str]:
    """Those of the states in an entry. What is no dictionary, but a tensor or an object, only its optimizer makes.
    ZeroRedundancyOptimizer loads None in place of what other processes have.
    """
    return set(entry or ()) if entry is None or isinstance(entry, dict) else {type(entry).__name__}


@cache
def _names_in(cls: type[Optimizer]) -> frozenset[str]:
    """The strings in the code of a class of optimizers, and those it has by a global name: the names of its states are
    among them.
    """
    methods = [method for c in cls.__mro__[: cls.__mro__.index(Optimizer)] for method in vars(c).values()]
    found: list[Any] = []
    for function in (inspect.unwrap(method) for method in methods if inspect.isfunction(method)):
        codes = [function.__code__]
        for code in codes:  # grows: comprehensions have code of their own
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            found += [function.__globals__.get(name) for name in code.co_names]
            for constant in code.co_consts:
                found += constant if isinstance(constant, (tuple, frozenset)) else [constant]
    return frozenset(name for name in found if isinstance(name, str))


def _step_of(base: Optimizer) -> Callable[[], Any]:
    """``base.step`` without global step hooks, which see SAM's own step."""
    unhooked = getattr(type(base).step, "__wrapped__", None)
    there_are_some = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
    its_own = has_hooks(base) or "step" in vars(base)
    if not there_are_some or its_own or unhooked is None:
        return base.step
    return unhooked.__get__(base)  # type: ignore[no-any-return]


def _is_misread(base: Optimizer, p: Tensor) -> bool:
    """Whether PyTorch's fused step on the CPU would get a parameter or its state wrong, whatever its gradient is."""
    if not is_dense(local_tensor(p)) or (isinstance(base, WRONG_IN_16_BITS) and p.dtype in ROUNDED):
        return True
    states = (state for state in (base.state.get(p) or {}).values() if isinstance(state, Tensor))
    return any(state.shape == p.shape and state.stride() != p.stride() for state in states)


@contextmanager
def _as_fused_on_cpu_expects(base: Optimizer) -> Iterator[None]:
    """Inside, what PyTorch's fused steps get wrong on the CPU is out of their way."""
    laid_out: list[tuple[Tensor, Tensor]] = []
    not_fused = []
    for group in base.param_groups if isinstance(base, FUSED_ON_CPU) else ():
        with_grad = (
            [p for p in group["params"] if p.grad is not None and p.device.type == "cpu"] if group.get("fused") else []
        )
        if any(_is_misread(base, p) for p in with_grad):
            not_fused.append(group)
        laid_out += [(p, p.grad) for p in with_grad if p.grad is not None and p.grad.stride() != p.stride()]
    try:
        for group in not_fused:
            group["fused"] = False
        for p, grad in laid_out:
            p.grad = torch.empty_like(p, requires_grad=False).copy_(grad)
        yield
    finally:
        for p, grad in laid_out:
            p.grad = grad
        for group in not_fused:
            group["fused"] = True
