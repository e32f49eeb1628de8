"""Stochastic rounding of 16-bit weights, with the bits of csrc/rounding.h, which says what it does and why."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .formulas import narrow


def signed_key(rounding_key: int | None, dtype: torch.dtype) -> tuple[int, bool]:
    """The key as an int32 with the same bits, for Triton to see one type whatever its value; and whether it is used."""
    if rounding_key is None or dtype not in (torch.bfloat16, torch.float16):
        return 0, False
    return rounding_key - (1 << 32) if rounding_key >= 1 << 31 else rounding_key, True


@triton.jit
def _mixed(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_bf16(value, random):
    rounded = (value + (random >> 16)) >> 16
    return tl.where((value & 0x7FFFFFFF) > 0x7F800000, (value >> 16) | 0x40, rounded)


@triton.jit
def _round_f16(value, random):
    magnitude = value & 0x7FFFFFFF
    normal = ((magnitude + (random >> 19)) >> 13) - 0x1C000
    # Below 2^-14, the smallest normal number.
    exponent = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | 0x800000
    drop = 126 - tl.where(exponent < 113, exponent, 112)
    over = tl.where(drop > 31, drop - 31, 0)
    shift = drop - over
    kept = significand >> tl.where(over < 24, over, 24)
    subnormal = (kept + (random >> (32 - shift))) >> shift
    large = tl.where(magnitude > 0x7F800000, 0x7E00, tl.where(magnitude < 0x477FF000, 0x7BFF, 0x7C00))
    finite = tl.where(magnitude < 0x38800000, subnormal, normal)
    return tl.where(magnitude < 0x477FE000, finite, large.to(tl.uint32)) | ((value >> 16) & 0x8000)


@triton.jit
def random_index(slot, start, lanes):
    """The elements' indices in the bucket, modulo 2^32: random bits are drawn from them."""
    return (slot + start).to(tl.uint32) + lanes.to(tl.uint32)


@triton.jit
def narrow_weight(x, DTYPE: tl.constexpr, index, key, STOCHASTIC: tl.constexpr):
    """A new weight in the tensors' dtype; ``STOCHASTIC``: by the random bits for ``key`` and ``index``."""
    if STOCHASTIC:
        value = x.to(tl.uint32, bitcast=True)
        random = _mixed(index ^ (value * 0x9E3779B9) ^ key)
        rounded = _round_bf16(value, random) if DTYPE == tl.bfloat16 else _round_f16(value, random)
        return rounded.to(tl.uint16).to(DTYPE, bitcast=True)
    else:
        return narrow(x, DTYPE)
