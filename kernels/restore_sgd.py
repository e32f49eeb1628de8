"""restore_sgd: put w back and step as torch.optim.SGD does, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .copy import WORDS, copy_chunk
from .formulas import decayed_gradient, narrow, sgd_momentum, sgd_nesterov, sgd_step, widen
from .rounding import narrow_weight, place_of, signed_key
from .table import DTYPES, MASKED_BLOCK, NUM_WARPS, WIDTHS, aligned_part, block_for, is_wide, load_chunk
from .update import block_of, gradient_factor, is_set, learning_rate, source_of


@triton.jit
def _step(
    source,
    w,
    g,
    m,
    scale,
    decay,
    minus_lr,
    momentum,
    keep,
    nesterov,
    mask,
    place,
    key,
    COMPUTE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One block."""
    stored = tl.load(source, mask=mask)
    weight = widen(stored, COMPUTE)
    direction = widen(tl.load(g, mask=mask), COMPUTE) * scale
    direction = tl.where(decay != 0.0, decayed_gradient(weight, direction, decay), direction)
    if MOMENTUM:
        buffer = sgd_momentum(widen(tl.load(m, mask=mask), COMPUTE), direction, momentum, keep)
        tl.store(m, narrow(buffer, stored.dtype), mask=mask)
        direction = tl.where(nesterov != 0.0, sgd_nesterov(direction, buffer, momentum), buffer)
    tl.store(w, narrow_weight(sgd_step(weight, direction, minus_lr), stored.dtype, place, key, STOCHASTIC), mask=mask)


@triton.jit
def _step_chunk(
    source,
    weights,
    grads,
    buffers,
    begin,
    slot,
    count,
    options,
    lr,
    factor,
    key,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    compute: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    pointer: tl.constexpr = tl.pointer_type(DTYPE)
    momentum = tl.load(options + 1).to(compute)
    keep = (1.0 - tl.load(options + 2)).to(compute)
    decay = tl.load(options + 3).to(compute)
    nesterov = tl.load(options + 4)
    scale = tl.where(tl.load(options + 5) != 0.0, -factor, factor).to(compute)
    minus_lr = (-lr).to(compute)
    addresses = source | weights | grads | buffers if MOMENTUM else source | weights | grads
    done = 0
    for shift in tl.static_range(WIDTHS):
        if is_wide(shift, DTYPE):
            part = aligned_part(addresses, done, count, shift, BLOCK)
            lanes = tl.arange(0, block_for(shift, BLOCK))
            s = tl.multiple_of(source.to(pointer), 16 >> shift)
            w = tl.multiple_of(weights.to(pointer) + begin, 16 >> shift)
            g = tl.multiple_of(grads.to(pointer) + begin, 16 >> shift)
            m = tl.multiple_of(buffers.to(pointer) + begin, 16 >> shift)
            for start in range(done, part, block_for(shift, BLOCK)):
                at = start + lanes
                place = place_of(slot, start, lanes)
                _step(
                    s + at, w + at, g + at, m + at, scale, decay, minus_lr, momentum, keep, nesterov, None, place, key, compute, MOMENTUM, STOCHASTIC
                )
            done = part
    s = source.to(pointer)
    w = weights.to(pointer) + begin
    g = grads.to(pointer) + begin
    m = buffers.to(pointer) + begin
    lanes = tl.arange(0, MASKED_BLOCK)
    for start in range(done, count, MASKED_BLOCK):
        at = start + lanes
        place = place_of(slot, start, lanes)
        _step(s + at, w + at, g + at, m + at, scale, decay, minus_lr, momentum, keep, nesterov, at < count, place, key, compute, MOMENTUM, STOCHASTIC)


@triton.jit(do_not_specialize=["num_chunks", "num_rows", "ticket", "key"], do_not_specialize_on_alignment=["grad_scale", "found_inf"])
def restore_sgd_kernel(
    chunks,
    num_chunks,
    table,
    num_rows,
    numbers,
    flat,
    written,
    ticket,
    grad_scale,
    found_inf,
    key,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    factor = gradient_factor(grad_scale)
    skipped = is_set(found_inf)
    key = key.to(tl.uint32, bitcast=True)
    for index in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        row, group, begin, count, slot = load_chunk(chunks, index)
        weights = tl.load(table + row)
        grads = tl.load(table + num_rows + row)
        if grads != 0:
            # Here, not once: the answer would be kept on the stack.
            saved = (tl.load(written) == ticket) & (tl.load(table + 2 * num_rows + row) != 0)
            if skipped:
                if saved:
                    copy_chunk(weights, flat, begin, slot, count, False, WORD, BLOCK, 1)  # skipped steps are rare: only 16 bytes or one element
            else:
                source = source_of(weights, begin, saved, flat, slot, DTYPE)
                buffers = tl.load(table + 3 * num_rows + row)
                options = numbers.to(tl.pointer_type(tl.float64)) + 6 * group
                lr = learning_rate(table + 4 * num_rows, group, tl.load(options))
                if tl.load(options + 1) != 0.0:
                    _step_chunk(source, weights, grads, buffers, begin, slot, count, options, lr, factor, key, DTYPE, BLOCK, True, STOCHASTIC)
                else:
                    _step_chunk(source, weights, grads, buffers, begin, slot, count, options, lr, factor, key, DTYPE, BLOCK, False, STOCHASTIC)


def restore_sgd(
    programs: int,
    chunks: torch.Tensor,
    table: torch.Tensor,
    num_rows: int,
    numbers: torch.Tensor,
    flat: torch.Tensor,
    written: torch.Tensor,
    ticket: int,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    rounding_key: int | None,
    dtype: torch.dtype,
) -> Any:
    """Launch. Returns the compiled kernel, None in the interpreter.

    Args:
        programs: how many programs share the chunks out.
        chunks: int64 ``[num_chunks, 5]``, the chunk table.
        table: int64 ``[4 * num_rows + 2 * num_groups]``, see :mod:`sam_fast.kernels.update`; rows without a gradient are left out.
        num_rows: number of rows of the bucket.
        numbers: int64 ``[6 * num_groups]``, float64 bits: ``struct SgdGroup`` (csrc/table.h).
        flat: uint8, the backup's memory; a multiple of 16 bytes.
        written: int64, one element. Unless it holds ``ticket`` no backup was written, and every row's weights are where they were.
        ticket: positive.
        grad_scale: float32, one element: gradients are divided by it. Or None.
        found_inf: float32, one element: unless it is 0, saved rows are only put back and all others stay as they are. Or None.
        rounding_key: 32 bits, for the stochastic rounding of 16-bit weights, or None.
        dtype: that of the rows and their state.
    """
    key, stochastic = signed_key(rounding_key, dtype)
    return restore_sgd_kernel[(programs,)](
        chunks,
        chunks.shape[0],
        table,
        num_rows,
        numbers,
        flat,
        written,
        ticket,
        grad_scale,
        found_inf,
        key,
        DTYPE=DTYPES[dtype],
        WORD=WORDS[dtype.itemsize][0],
        BLOCK=block_of(dtype),
        STOCHASTIC=stochastic,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
