"""Makes Triton's interpreter several times faster.

Whenever one kernel function calls another, the interpreter looks through all of triton.language for what it has to replace. That was done when the
kernel was launched, and takes longer than most blocks of a kernel. So here it is done once for each launch.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_replace = interpreter._patch_lang


@cache
def _languages(fn: Any) -> list[Any]:
    return [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]


def _replace_once(fn: Any) -> Any:
    modules = _languages(fn)
    if modules and not any(tl.core.is_builtin(module.load) for module in modules):
        return interpreter._LangPatchScope()  # nothing to undo
    return _replace(fn)


interpreter._patch_lang = _replace_once
