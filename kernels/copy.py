"""backup and restore: copy a bucket's tensors to and from its backup, bit for bit, whatever their dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from .table import MASKED_BLOCK, NUM_WARPS, WIDTHS, aligned_part, block_for, is_wide, load_chunk

WORDS = {1: (tl.int8, 1), 2: (tl.int16, 1), 4: (tl.int32, 1), 8: (tl.int64, 1), 16: (tl.int64, 2)}
"""Itemsize -> the integer type that elements are moved as, and how many of these an element is."""

BLOCK_BYTES = 8192
"""How much a program moves at once: four 16-byte accesses for each of its 128 threads."""


@triton.jit
def copy_chunk(
    address,
    backup,
    begin,
    slot,
    count,
    TO_BACKUP: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
    TRIED: tl.constexpr = WIDTHS,
):
    saved = backup.to(tl.pointer_type(WORD))
    done = 0
    for shift in tl.static_range(TRIED):
        if is_wide(shift, WORD):
            part = aligned_part(address, done, count, shift, BLOCK)
            lanes = tl.arange(0, block_for(shift, BLOCK))
            tensor = tl.multiple_of(address.to(tl.pointer_type(WORD)) + begin, 16 >> shift)
            for start in range(done, part, block_for(shift, BLOCK)):
                at = tl.multiple_of(slot + start, (128 >> shift) // WORD.primitive_bitwidth)
                if TO_BACKUP:
                    tl.store(saved + at + lanes, tl.load(tensor + start + lanes))
                else:
                    tl.store(tensor + start + lanes, tl.load(saved + at + lanes))
            done = part
    tensor = address.to(tl.pointer_type(WORD)) + begin
    saved += slot
    lanes = tl.arange(0, MASKED_BLOCK)
    for start in range(done, count, MASKED_BLOCK):
        mask = start + lanes < count
        if TO_BACKUP:
            tl.store(saved + start + lanes, tl.load(tensor + start + lanes, mask=mask), mask=mask)
        else:
            tl.store(tensor + start + lanes, tl.load(saved + start + lanes, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["num_chunks", "ticket"])
def copy_kernel(
    chunks,
    num_chunks,
    tensors,
    backup,
    written,
    ticket,
    TO_BACKUP: tl.constexpr,
    WORD: tl.constexpr,
    WORDS_PER_ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if TO_BACKUP:
        if tl.program_id(0) == 0:
            tl.store(written, ticket)
        end = num_chunks
    else:
        # Without this ticket the backup was never written: the launch that should have done so did not happen.
        end = tl.where(tl.load(written) == ticket, num_chunks, 0)
    for index in range(tl.program_id(0), end, tl.num_programs(0)):
        tensor, _group, begin, count, slot = load_chunk(chunks, index)
        address = tl.load(tensors + tensor)
        if address != 0:
            begin *= WORDS_PER_ELEMENT
            slot *= WORDS_PER_ELEMENT
            copy_chunk(address, backup, begin, slot, count * WORDS_PER_ELEMENT, TO_BACKUP, WORD, BLOCK)


def _launch(
    programs: int,
    chunks: torch.Tensor,
    tensors: torch.Tensor,
    saved: torch.Tensor,
    written: torch.Tensor,
    ticket: int,
    itemsize: int,
    *,
    to_backup: bool,
) -> Any:
    """Copy the tensors to the backup, or from it. Returns the compiled kernel, None in the interpreter.

    Args:
        programs: how many programs share the chunks out.
        chunks: int64 ``[num_chunks, 5]``, the chunk table.
        tensors: int64 ``[num_tensors]``: their addresses; tensors with address 0 are left out.
        saved: uint8, the backup's memory; a multiple of 16 bytes.
        written: int64, one element: backup leaves ``ticket`` there, and without it restore does nothing.
        ticket: positive.
        itemsize: bytes per element: 1, 2, 4, 8 or 16.
    """
    word, words_per_element = WORDS[itemsize]
    return copy_kernel[(programs,)](
        chunks,
        chunks.shape[0],
        tensors,
        saved,
        written,
        ticket,
        TO_BACKUP=to_backup,
        WORD=word,
        WORDS_PER_ELEMENT=words_per_element,
        BLOCK=BLOCK_BYTES * words_per_element // itemsize,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


backup = partial(_launch, to_backup=True)
restore = partial(_launch, to_backup=False)
