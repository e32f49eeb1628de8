"""How the kernels find a bucket's tensors: the chunk table, the address tables, and how wide a chunk may be accessed.

All tables are int64 in device memory. The chunk table is ``bucket.chunks`` (``struct Chunk`` in csrc/table.h), an
address table has one address for each tensor, 0 where it takes no part, and the group table has ``rho, eta, adaptive``
for each group (``struct Group``), float64.

Launches walk the chunks with a fixed number of programs: program p of P takes the chunks p, p + P, and so on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""The dtypes that the kernels compute with."""

NUM_WARPS = 4

BLOCK = 2048
"""Elements that a program moves at once: 16 for each of its 128 threads, so four 16-byte accesses are under way for
each float32 array."""

MASKED_BLOCK = tl.constexpr(512)
"""Elements moved at once where accesses are masked or not aligned. Each element has an address of its own, and more of
them would take all the registers.

The pointers and lanes of these accesses are computed anew, without the promise of alignment. If they were shared with
the wide accesses, the compiler would order their elements as these need it, and move them through shared memory.
"""


@triton.jit
def load_chunk(chunks, index):
    """A chunk: tensor, group, first element in the tensor, count (int32), first element in the bucket's index space."""
    chunk = chunks + 5 * index
    return tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3).to(tl.int32), tl.load(chunk + 4)


@triton.jit
def load_group(groups, group):
    """``rho, eta, adaptive`` of a group."""
    entry = groups.to(tl.pointer_type(tl.float64)) + 3 * group
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


WIDTHS = tl.constexpr(4)
"""How many widths of accesses are tried: 16, 8, 4 and 2 bytes, those that are wider than an element."""


# The results of these two must be constants for the compiler. A jit function's result is not one with Triton 3.6.
@triton.constexpr_function
def is_wide(SHIFT, DTYPE):
    """Whether ``16 >> SHIFT`` bytes are more than one element."""
    return (16 >> SHIFT) * 8 > DTYPE.primitive_bitwidth


@triton.constexpr_function
def block_for(SHIFT, BLOCK):
    """Elements moved at once with accesses of ``16 >> SHIFT`` bytes, ``BLOCK`` being that for 16.

    Each width has a number of its own, and so do masked accesses. For blocks of one shape the compiler would order the
    elements of all as the widest access needs it, and move the others through shared memory to store them.
    """
    return BLOCK >> SHIFT if SHIFT == 0 or (BLOCK >> SHIFT) != MASKED_BLOCK.value else MASKED_BLOCK.value // 2


@triton.jit
def aligned_part(addresses, done, count, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The end of the part of a chunk that can be moved in whole blocks, unmasked and ``16 >> SHIFT`` bytes at a time.

    ``done`` elements have been moved already. ``addresses``: those of the tensors, or-ed together. They alone decide: a
    chunk begins at a multiple of 16 bytes from them, and in the backup at a multiple of 64 bytes. ``tl.multiple_of``
    tells the compiler so; without it, or with a mask, every access becomes a scalar one.
    """
    block: tl.constexpr = block_for(SHIFT, BLOCK)
    return tl.where(addresses % (16 >> SHIFT) == 0, done + (count - done) // block * block, done)
