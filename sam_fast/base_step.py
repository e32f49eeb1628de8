"""Calling the base optimizer's own step, where it is not fused with the restore, and what has to surround the call."""

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
from .options import with_inner
from .rounding import ROUNDED
from .steps import rule_of

FUSED_ON_CPU = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
"""Optimizers whose ``fused=True`` step on the CPU assumes that parameters have no gaps in memory, and that gradients
and state have the layout of their parameters (PyTorch 2.10 to 2.15).
"""

WRONG_IN_16_BITS = (torch.optim.SGD,) if torch.__version__ < (2, 14) else ()  # type: ignore[operator]
"""Those of them that also compute wrong values in 16 bits."""

PLAIN_ZERO_GRAD = Optimizer.zero_grad
"""PyTorch's own method. Tools replace it in the class."""

profiling: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)
"""Whether a profiler is recording what is called."""


def maximizes(base: Optimizer) -> bool:
    """Whether an optimizer maximizes in groups without ``maximize``: pytorch_optimizer's have it as an attribute."""
    said = (getattr(optimizer, "maximize", False) for optimizer in with_inner(base))
    return any(bool(value) and not callable(value) for value in said)


class BaseStep:
    """Calls ``base.step()`` so that global hooks run once, and what others keep in its state does no harm.

    PyTorch's optimizers take any non-empty ``state[p]`` for their own. So what users keep in ``optimizer.state[p]``
    before the base optimizer's first step with p is set aside during that step. Users may also put the base optimizer's
    own state there, restored by name or made for a parameter that has grown: the names of the entries tell which it is.

    ``base.step()`` may also be called directly: by a loop, as in a warm-up, or by a variant of SAM in a ``second_step``
    of its own. Hooks on the base optimizer then do the same, and put back the statistics of disabled BatchNorm layers,
    as at the end of SAM's step.

    Args:
        base: the base optimizer.
        perturbation: that of the SAM. Calling ``base.step()`` directly while it is active is an error.
    """

    def __init__(self, base: Optimizer, perturbation: Any) -> None:
        self._foreign: set[str] = set()  # names of entries that are not the base optimizer's
        self._aside: dict[Tensor, dict[str, Any]] = {}
        self._called = False
        self._perturbation = ref(perturbation)
        self.look_at(base)
        _unhook_dead(base)
        # not by the methods that register hooks: their handles need what some wrappers' dictionaries lack
        base._optimizer_step_pre_hooks[self] = self._before_alone  # type: ignore[index]
        base._optimizer_step_post_hooks[self] = self._after_alone  # type: ignore[index]

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the base optimizer, which copies its hooks. The copy belongs to no SAM and knows no parameters.

        ``type(None)``, when called, returns None like a dead reference.
        """
        return {**vars(self), "_perturbation": type(None), "_state": None}

    def look_at(self, base: Optimizer) -> None:
        """Take all that is in the state of ``base`` now for its own, except names that are known to be foreign."""
        self._state = base.state
        entries = ((p, entry) for p, entry in base.state.items() if isinstance(p, Tensor))  # MADGRAD also has a "k"
        self._initialised = {id(p) for p, entry in entries if _names_of(entry) - self._foreign}
        self._entries = len(base.state)

    def adopt(self, base: Optimizer, params: Iterable[Tensor]) -> None:
        """Take the state that ``base`` has made for new parameters, outside its step, for its own."""
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
        if base.state is not self._state:  # a state dict was loaded
            self._aside = {}
            self.look_at(base)
        elif self._aside:  # a direct base.step() has raised
            self._after(base)
        if self._foreign or len(base.state) != self._entries:
            self._set_aside(base)

    def _after(self, base: Optimizer) -> None:
        aside = self._aside
        for p, entry in aside.items():
            base.state[p] |= entry
        self._aside = {}  # only now, so that an interruption loses nothing
        if aside or len(base.state) != self._entries:
            self.look_at(base)

    def _set_aside(self, base: Optimizer) -> None:
        cls: Any = type(base)
        rule = rule_of(cls)
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
    """``base.zero_grad()``, but in half the time if that is PyTorch's own."""
    if not set_to_none:
        base.zero_grad(False)
    elif getattr(base.zero_grad, "__func__", None) is not PLAIN_ZERO_GRAD or profiling():
        base.zero_grad()  # a user's own may take no argument
    else:
        for group in base.param_groups:
            for p in group["params"]:
                p.grad = None


def is_scheduler_wrapper(step: Any, optimizer: Optimizer) -> bool:
    """Whether the ``step`` that was put on an optimizer is a learning rate scheduler's wrapper, which only notes in
    ``_opt_called`` that it was called.
    """
    return hasattr(step, "_wrapped_by_lr_sched") and getattr(step, "__wrapped__", None) is type(optimizer).step


def has_hooks(base: Optimizer) -> bool:
    """Whether a base optimizer has step hooks other than a SAM's."""
    keys: list[Any] = [*base._optimizer_step_pre_hooks, *base._optimizer_step_post_hooks]
    return any(type(key) is not BaseStep for key in keys)


def _unhook_dead(base: Optimizer) -> None:
    """Remove the hooks of deleted SAMs from a base optimizer. They cannot go when the SAM is deleted: the garbage
    collector may delete it in the middle of the base optimizer's step.
    """
    dictionaries: list[Any] = [base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks]
    for hooks in dictionaries:
        for key in list(hooks):
            if isinstance(key, BaseStep) and key._perturbation() is None:
                del hooks[key]


def _names_of(entry: Any) -> set[str]:
    """The names of the states in an entry. An entry that is a tensor or an object, not a dictionary, can only be the
    optimizer's: its type's name stands for it. ZeroRedundancyOptimizer loads None where another process has the state.
    """
    return set(entry or ()) if entry is None or isinstance(entry, dict) else {type(entry).__name__}


@cache
def _names_in(cls: type[Optimizer]) -> frozenset[str]:
    """All strings in the code of an optimizer class, and in the globals that it uses: the names of its states are among
    them.
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
    """``base.step`` without the global step hooks, which are called for SAM's own step."""
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
    """Inside, PyTorch's fused CPU steps get nothing that they would misread: ``fused`` is off for groups with such
    parameters, and gradients have the strides of their parameters.
    """
    laid_out: list[tuple[Tensor, Tensor]] = []
    not_fused = []
    fused = [group for group in base.param_groups if group.get("fused")] if isinstance(base, FUSED_ON_CPU) else []
    for group in fused:
        with_grad = [p for p in group["params"] if p.grad is not None and p.device.type == "cpu"]
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
