"""Hooks before and after the forward pass of every module, for as long as they are needed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

# A compiled model warns that global hooks are called for it and for what it wraps. Ours expect that.
_IGNORED = ("ignore", re.compile(r"Using `torch\.compile\(module\)` when there are global hooks"), UserWarning, None, 0)


class ModuleHooks:
    """A pair of global module hooks.

    Dynamo compiles with them or without, and does not compile again when they come or go; in what it has compiled they are not called.

    Args:
        before: takes a module and its positional arguments, before its forward pass.
        after: takes a module, its positional arguments and its output, also after a forward pass that raises; or None.
    """

    def __init__(self, before: Callable[[nn.Module, Any], None], after: Callable[[nn.Module, Any, Any], None] | None = None) -> None:
        self._before = before
        self._after = after
        self._handles: list[Any] = []
        self._silenced = False

    def install(self) -> None:
        """Does nothing if they are."""
        if self._handles:
            return
        # The warning concerns the hooks of others too. Not through warnings.filterwarnings, which forgets what has been shown once.
        self._silenced = not torch_module._has_any_global_hook() or _IGNORED in warnings.filters
        if self._silenced:
            warnings.filters.insert(0, _IGNORED)  # type: ignore[attr-defined]
        self._handles.append(torch_module.register_module_forward_pre_hook(self._before))
        if self._after is not None:
            self._handles.append(torch_module.register_module_forward_hook(self._after, always_call=True))

    def remove(self) -> None:
        """Does nothing if they are not installed."""
        while self._handles:
            self._handles.pop().remove()
        if self._silenced:
            self._silenced = False
            if _IGNORED in warnings.filters:  # not if somebody has changed the filters since
                warnings.filters.remove(_IGNORED)  # type: ignore[attr-defined]
