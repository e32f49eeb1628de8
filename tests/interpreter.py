"""Makes Triton's interpreter several times faster, and the fused multiply-add of older versions round once.

Whenever one kernel function calls another, the interpreter looks through all of triton.language for what it has to
replace. That was done when the kernel was launched, and takes longer than most blocks of a kernel. So here it is done
once for each launch.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
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


class Unmasked:
    """The accesses without a mask. They are compiled to wide ones, which fault at addresses that are not aligned; the
    interpreter would not mind.

    ``width[n]``: in bytes, for a block of n elements; each width has blocks of its own size.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, width: dict[int, int]) -> None:
        self.width = width
        self.found: Counter[int] = Counter()
        for name in ("create_load", "create_store"):
            monkeypatch.setattr(
                interpreter.InterpreterBuilder, name, self._watched(getattr(interpreter.InterpreterBuilder, name))
            )

    def _watched(self, access: Callable[..., Any]) -> Callable[..., Any]:
        def watched(builder: Any, pointers: Any, *args: Any) -> Any:
            if pointers.data.size > 1:
                width = self.width[pointers.data.size]
                assert int(pointers.data.flat[0]) % width == 0
                self.found[width] += 1
            return access(builder, pointers, *args)

        return watched


def blocks_by_width(counts: Iterable[int], address: int, width: dict[int, int]) -> Counter[int]:
    """How many blocks of each width move chunks of ``counts`` elements; ``address``: of everything that is moved, or-ed
    together.
    """
    found: Counter[int] = Counter()
    for count in counts:
        for block, wide in sorted(width.items(), key=lambda item: -item[1]):
            if address % wide == 0:
                found[wide] += count // block
                count %= block
    return found


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """One rounding, for 32 and 16 bits: the product is exact in float64, and a sum rounded to odd there can be rounded
    again.
    """
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
