"""Hooks before and after the forward pass of every module, for as long as they are needed."""

from __future__ import annotations

import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from threading import RLock
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

# A compiled model warns that global hooks are called for it and for what it wraps. Ours expect that.
_IGNORED = ("ignore", re.compile(r"Using `torch\.compile\(module\)` when there are global hooks"), UserWarning, None, 0)


_our_keys: set[int] = set()


def _others_have_hooks() -> bool:
    return any(
        not _our_keys.issuperset(hooks)
        for hooks in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
    )


def _is_being_compiled() -> bool:
    """Whether TorchDynamo is compiling in this thread. Hooks that it has seen must stay until its guards are made."""
    context = getattr(sys.modules.get("torch._guards"), "CompileContext", None)
    return context is not None and context.try_get() is not None


class ModuleHooks:
    """A pair of global module hooks that can be installed and removed repeatedly.

    If Dynamo compiles while the hooks are installed, its guards contain their keys. So the keys stay the same, and
    nothing is compiled again and again. Compiled code does not call the hooks.

    Args:
        needed: returns whether the hooks are needed now.
        before: takes a module and its positional arguments, before its forward pass.
        after: takes a module, its positional arguments and its output, also after a forward pass that raises; or None.
    """

    def __init__(
        self,
        needed: Callable[[], bool],
        before: Callable[[nn.Module, Any], None],
        after: Callable[[nn.Module, Any, Any], None] | None = None,
    ) -> None:
        self._needed = needed
        self._before = self._unless_compiling(before)
        self._after = None if after is None else self._unless_compiling(after)
        self._key = RemovableHandle(OrderedDict()).id
        _our_keys.add(self._key)
        self._installed = False
        self._late = False  # no longer needed, but still installed
        self._filters: list[Any] = []  # those of Python's warnings that ours was put into
        self._lock = RLock()

    def _unless_compiling(self, hook: Callable[..., None]) -> Callable[..., None]:
        """The part of a hook that TorchDynamo traces. The rest of the package is hidden from it (compiling.py)."""

        def call(*args: Any) -> None:
            if not torch.compiler.is_compiling():
                if self._late:
                    self.update()
                hook(*args)

        return call

    def update(self) -> None:
        """Install the hooks if they are needed, else remove them. The lock keeps other threads out between question and
        answer. If a model is freed while another is being compiled, they are removed later.
        """
        with self._lock:
            needed = self._needed()
            self._late = not needed and self._installed and _is_being_compiled()
            if needed and not self._installed:
                self.install()
            elif self._installed and not (needed or self._late):
                self.remove()

    def install(self) -> None:
        # If others have hooks, the warning is about those too, and stays. Not through warnings.filterwarnings, which
        # makes Python show warnings again that it has shown once.
        if not _others_have_hooks():
            self._filters = warnings.filters  # type: ignore[assignment]  # replaced by warnings.catch_warnings()
            self._filters.insert(0, _IGNORED)
        self._installed = True
        torch_module._global_forward_pre_hooks[self._key] = self._before
        if self._after is not None:
            torch_module._global_forward_hooks[self._key] = self._after
            torch_module._global_forward_hooks_always_called[self._key] = True

    def remove(self) -> None:
        self._installed = False
        hooks = (
            torch_module._global_forward_pre_hooks,
            torch_module._global_forward_hooks,
            torch_module._global_forward_hooks_always_called,
        )
        for known in hooks:
            known.pop(self._key, None)
        if _IGNORED in self._filters:  # not if others had hooks, or somebody has changed the filters since
            self._filters.remove(_IGNORED)
        self._filters = []
