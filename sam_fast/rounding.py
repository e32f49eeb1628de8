"""Stochastic rounding of weights in the 16-bit formats, in plain PyTorch, and its keys.

csrc/rounding.h says what it does and why.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

import torch
from torch import Tensor

ROUNDED = (torch.bfloat16, torch.float16)
"""The dtypes that stochastic rounding is for."""

PERTURB, UPDATE = 0, 1
"""The two roundings of a step; each has a key of its own."""


def rounding_key(step: int, operation: int) -> int:
    """The 32-bit key of one operation, ``PERTURB`` or ``UPDATE``, of one step. The same on every rank, so that replicas
    stay equal.
    """
    return int.from_bytes(blake2b(struct.pack("<qq", step, operation), digest_size=4).digest(), "little")


def round_stochastically(x: Tensor, dtype: torch.dtype, index: Tensor, key: int) -> Tensor:
    """``x`` in ``dtype``, each element rounded up or down with the probability that makes it right on average.

    Args:
        x: float32.
        dtype: bfloat16 or float16.
        index: int32, of x's shape: each element's position in the bucket, modulo 2^32.
        key: from :func:`rounding_key`.
    """
    value = x.view(torch.int32)
    random = _mixed(index ^ (value * _signed(0x9E3779B9)) ^ _signed(key))
    bits = _round_bf16(value, random) if dtype == torch.bfloat16 else _round_f16(value, random)
    return bits.to(torch.int16).view(dtype)


def _signed(word: int) -> int:
    """The int32 with the same bits: PyTorch has no arithmetic for uint32."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _shifted(x: Tensor, by: int | Tensor) -> Tensor:
    """x >> by as for unsigned numbers, ``by`` at least 1."""
    return (x >> by) & (0x7FFFFFFF >> (by - 1))


def _mixed(x: Tensor) -> Tensor:
    x = x ^ _shifted(x, 16)
    x = x * 0x7FEB352D
    x = x ^ _shifted(x, 15)
    x = x * _signed(0x846CA68B)
    return x ^ _shifted(x, 16)


def _round_bf16(value: Tensor, random: Tensor) -> Tensor:
    nan = (value & 0x7FFFFFFF) > 0x7F800000
    return torch.where(nan, _shifted(value, 16) | 0x40, _shifted(value + _shifted(random, 16), 16))


def _round_f16(value: Tensor, random: Tensor) -> Tensor:
    magnitude = value & 0x7FFFFFFF
    normal = ((magnitude + _shifted(random, 19)) >> 13) - 0x1C000
    exponent, significand = magnitude >> 23, (magnitude & 0x7FFFFF) | 0x800000
    drop = 126 - exponent.clamp(max=112)
    over = (drop - 31).clamp(min=0)
    shift = drop - over
    kept = significand >> over.clamp(max=24)
    subnormal = _shifted(kept + _shifted(random, 32 - shift), shift)
    large = torch.where(magnitude > 0x7F800000, 0x7E00, torch.where(magnitude < 0x477FF000, 0x7BFF, 0x7C00))
    finite = torch.where(magnitude < 0x38800000, subnormal, normal)
    return torch.where(magnitude < 0x477FE000, finite, large.to(torch.int32)) | (_shifted(value, 16) & 0x8000)
