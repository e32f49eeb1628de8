"""Hooks before and after the forward pass of every module, for as long as they are needed."""

from __future__ import annotations

import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
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
    """Whether TorchDynamo is at work in this thread. What it has found must stay until its guards are made."""
    context = getattr(sys.modules.get("torch._guards"), "CompileContext", None)
    return context is not None and context.try_get() is not None


class ModuleHooks:
    """A pair of global module hooks that can be put in and taken out again.

    Where Dynamo compiles while they are in, its guards hold their keys: these stay the same, so that nothing is
    compiled again and again. In what is compiled they are not called.

    Args:
        needed: says whether they are needed now.
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
        self._late = False  # no longer needed, but still in
        self._silenced = False
        self._filters: Sequence[Any] = []
        self._lock = RLock()

    def _unless_compiling(self, hook: Callable[..., None]) -> Callable[..., None]:
        """What TorchDynamo traces of a hook: the rest of the package it must not see (compiling.py)."""

        def call(*args: Any) -> None:
            if not torch.compiler.is_compiling():
                if self._late:
                    self.update()
                hook(*args)

        return call

    def update(self) -> None:
        """Put them in if they are needed, else take them out; what is asked and what is done are one, whatever other
        threads do. Where a model is freed while another is compiled, they are taken out later.
        """
        with self._lock:
            needed = self._needed()
            self._late = not needed and self._installed and _is_being_compiled()
            if needed:
                self.install()
            elif not self._late:
                self.remove()

    def install(self) -> None:
        """Does nothing if they are in."""
        if self._installed:
            return
        # The warning concerns the hooks of others too. Not through warnings.filterwarnings, which forgets what has been
        # shown once.
        self._silenced = not _others_have_hooks()
        if self._silenced:
            self._filters = warnings.filters  # those of now: warnings.catch_warnings() puts others in their place
            self._filters.insert(0, _IGNORED)  # type: ignore[attr-defined]
        self._installed = True
        torch_module._global_forward_pre_hooks[self._key] = self._before
        if self._after is not None:
            torch_module._global_forward_hooks[self._key] = self._after
            torch_module._global_forward_hooks_always_called[self._key] = True

    def remove(self) -> None:
        """Does nothing if they are not in."""
        if not self._installed:
            return
        self._installed = False
        hooks = (
            torch_module._global_forward_pre_hooks,
            torch_module._global_forward_hooks,
            torch_module._global_forward_hooks_always_called,
        )
        for known in hooks:
            known.pop(self._key, None)
        if self._silenced and _IGNORED in self._filters:  # not if somebody has changed the filters since
            self._filters.remove(_IGNORED)  # type: ignore[attr-defined]
