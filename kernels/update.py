"""What the fused second steps have in common: where a chunk's weights come from, how gradients are scaled, when there is no step.

Their address table (int64) has for each row the address of its weight, of its gradient, of its weight again if it is saved, else 0, and of each
state of the base optimizer; then for each group the address of a learning rate on the device, 0 without one, and its size in bytes. What may
change with every step is in a table of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_BYTES = 4096
"""Of each array, moved by a program at once. Adam moves up to nine: two 16-byte accesses for each of its 128 threads are enough under way."""


def block_of(dtype: torch.dtype) -> int:
    """Elements of ``dtype`` that a program moves at once."""
    return BLOCK_BYTES // dtype.itemsize


@triton.jit
def gradient_factor(grad_scale):
    """What gradients are multiplied by, float64: the float32 nearest to ``1 / grad_scale``, or 1 without a scale."""
    if grad_scale is None:
        return tl.full((), 1.0, tl.float64)
    else:
        return (1.0 / tl.load(grad_scale).to(tl.float64)).to(tl.float32).to(tl.float64)


@triton.jit
def is_set(flag):
    """Whether ``flag``, on the device, is not 0; False without one."""
    if flag is None:
        return False
    else:
        return tl.load(flag) != 0.0


@triton.jit
def learning_rate(rates, group, lr):
    """``lr``, or the learning rate on the device if the group has one."""
    entry = rates + 2 * group
    address = tl.load(entry)
    if address != 0:
        if tl.load(entry + 1) == 8:
            lr = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            lr = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return lr


@triton.jit
def source_of(weights, begin, saved, flat, slot, DTYPE: tl.constexpr):
    """The address that a chunk's weights are read from: the backup if the row is saved, else the row itself."""
    itemsize: tl.constexpr = DTYPE.primitive_bitwidth // 8
    return tl.where(saved, flat.to(tl.int64) + slot * itemsize, weights + begin * itemsize)
