"""Makes Triton's interpreter several times faster, and an older one's fused multiply-add one that rounds once.

Whenever one kernel function calls another, the interpreter looks through all of triton.language for what it has to replace. That was done when the
kernel was launched, and takes longer than most blocks of a kernel. So here it is done once for each launch.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import numpy as np
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


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """One rounding, for 32 and 16 bits: the product is exact in float64, and a sum rounded to odd there can be rounded again."""
    if z.data.dtype == np.float64:
        return _twice_rounded(self, x, y, z)
    product = np.multiply(x.data, y.data, dtype=np.float64)
    total = np.atleast_1d(product + z.data)
    part = total - product
    error = (product - (total - part)) + (z.data - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(error) & (error != 0) & (bits % 2 == 0)
    bits += np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)
    return interpreter.TensorHandle(total.reshape(product.shape).astype(z.data.dtype), z.dtype.scalar)


if not hasattr(interpreter._interpreter, "fma_fp32"):  # Triton 3.6 multiplies, rounds, adds and rounds
    _twice_rounded = interpreter.InterpreterBuilder.create_fma
    interpreter.InterpreterBuilder.create_fma = _fma
