"""restore_adam: put w back and step as torch.optim.Adam or AdamW does, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .copy import WORDS, copy_chunk
from .formulas import (
    adam_first_moment,
    adam_largest,
    adam_second_moment,
    adam_step,
    bias_correction,
    decayed_gradient,
    decayed_weight,
    narrow,
    widen,
)
from .rounding import narrow_weight, place_of, signed_key
from .table import DTYPES, MASKED_BLOCK, NUM_WARPS, WIDTHS, aligned_part, block_for, is_wide, load_chunk
from .update import block_of, gradient_factor, is_set, learning_rate, source_of


@triton.jit
def _step(
    source,
    w,
    g,
    m,
    v,
    largest,
    mask,
    place,
    scale,
    decay,
    factor,
    keep1,
    beta2,
    keep2,
    eps,
    minus_step_size,
    root_correction,
    key,
    COMPUTE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One block."""
    stored = tl.load(source, mask=mask)
    weight = widen(stored, COMPUTE)
    grad = widen(tl.load(g, mask=mask), COMPUTE) * scale
    grad = tl.where(decay != 0.0, decayed_gradient(weight, grad, decay), grad)
    weight = decayed_weight(weight, factor)
    first = adam_first_moment(widen(tl.load(m, mask=mask), COMPUTE), grad, keep1)
    second = adam_second_moment(widen(tl.load(v, mask=mask), COMPUTE), grad, beta2, keep2)
    tl.store(m, narrow(first, stored.dtype), mask=mask)
    tl.store(v, narrow(second, stored.dtype), mask=mask)
    if AMSGRAD:
        second = adam_largest(widen(tl.load(largest, mask=mask), COMPUTE), second)
        tl.store(largest, narrow(second, stored.dtype), mask=mask)
    moved = adam_step(weight, first, second, minus_step_size, root_correction, eps)
    tl.store(w, narrow_weight(moved, stored.dtype, place, key, STOCHASTIC), mask=mask)


@triton.jit
def _step_chunk(
    source,
    weights,
    grads,
    first,
    second,
    third,
    begin,
    slot,
    count,
    options,
    lr,
    correction1,
    correction2,
    unscaling,
    key,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    compute: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    pointer: tl.constexpr = tl.pointer_type(DTYPE)
    beta2 = tl.load(options + 2)
    keep1 = (1.0 - tl.load(options + 1)).to(compute)
    keep2 = (1.0 - beta2).to(compute)
    beta2 = beta2.to(compute)
    eps = tl.load(options + 3).to(compute)
    weight_decay = tl.load(options + 4)
    decoupled = tl.load(options + 5) != 0.0
    # A decay of 0 and a factor of 1 change nothing.
    decay = tl.where(decoupled, 0.0, weight_decay).to(compute)
    factor = tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(compute)
    scale = tl.where(tl.load(options + 7) != 0.0, -unscaling, unscaling).to(compute)
    minus_step_size = (-lr / correction1).to(compute)
    root_correction = correction2.to(compute)
    done = 0
    for shift in tl.static_range(WIDTHS):
        if is_wide(shift, DTYPE):
            part = aligned_part(source | weights | grads | first | second | third, done, count, shift, BLOCK)
            lanes = tl.arange(0, block_for(shift, BLOCK))
            s = tl.multiple_of(source.to(pointer), 16 >> shift)
            w = tl.multiple_of(weights.to(pointer) + begin, 16 >> shift)
            g = tl.multiple_of(grads.to(pointer) + begin, 16 >> shift)
            m = tl.multiple_of(first.to(pointer) + begin, 16 >> shift)
            v = tl.multiple_of(second.to(pointer) + begin, 16 >> shift)
            x = tl.multiple_of(third.to(pointer) + begin, 16 >> shift)
            for start in range(done, part, block_for(shift, BLOCK)):
                at = start + lanes
                place = place_of(slot, start, lanes)
                _step(
                    s + at,
                    w + at,
                    g + at,
                    m + at,
                    v + at,
                    x + at,
                    None,
                    place,
                    scale,
                    decay,
                    factor,
                    keep1,
                    beta2,
                    keep2,
                    eps,
                    minus_step_size,
                    root_correction,
                    key,
                    compute,
                    AMSGRAD,
                    STOCHASTIC,
                )
            done = part
    s = source.to(pointer)
    w = weights.to(pointer) + begin
    g = grads.to(pointer) + begin
    m = first.to(pointer) + begin
    v = second.to(pointer) + begin
    x = third.to(pointer) + begin
    lanes = tl.arange(0, MASKED_BLOCK)
    for start in range(done, count, MASKED_BLOCK):
        at = start + lanes
        place = place_of(slot, start, lanes)
        _step(
            s + at,
            w + at,
            g + at,
            m + at,
            v + at,
            x + at,
            at < count,
            place,
            scale,
            decay,
            factor,
            keep1,
            beta2,
            keep2,
            eps,
            minus_step_size,
            root_correction,
            key,
            compute,
            AMSGRAD,
            STOCHASTIC,
        )


@triton.jit
def _corrections(numbers, row, common1, common2, steps, DEVICE_STEPS: tl.constexpr):
    """``1 - beta1^t`` and ``sqrt(1 - beta2^t)`` of one row."""
    first = tl.load(numbers + 2 * row)
    second = tl.load(numbers + 2 * row + 1)
    second = tl.where(first == 0.0, common2, second)
    first = tl.where(first == 0.0, common1, first)
    if DEVICE_STEPS:
        t = (tl.load(steps.to(tl.pointer_type(tl.float32))) + 1.0).to(tl.float64)
        first = bias_correction(first, t)
        second = tl.sqrt(bias_correction(second, t))
    return first, second


@triton.jit(do_not_specialize=["num_chunks", "num_rows", "ticket", "key"], do_not_specialize_on_alignment=["grad_scale", "found_inf"])
def restore_adam_kernel(
    chunks,
    num_chunks,
    table,
    num_rows,
    numbers,
    common1: tl.float64,
    common2: tl.float64,
    flat,
    written,
    ticket,
    grad_scale,
    found_inf,
    key,
    DEVICE_STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    backed_up = tl.load(written) == ticket
    factor = gradient_factor(grad_scale)
    skipped = is_set(found_inf)
    key = key.to(tl.uint32, bitcast=True)
    numbers = numbers.to(tl.pointer_type(tl.float64))
    for index in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        row, group, begin, count, slot = load_chunk(chunks, index)
        entry = table + row
        weights = tl.load(entry)
        grads = tl.load(entry + num_rows)
        if grads != 0:
            saved = backed_up & (tl.load(entry + 2 * num_rows) != 0)
            if skipped:
                if saved:
                    copy_chunk(weights, flat, begin, slot, count, False, WORD, BLOCK, 1)  # skipped steps are rare: only 16 bytes or one element
            else:
                source = source_of(weights, begin, saved, flat, slot, DTYPE)
                steps = tl.load(entry + 3 * num_rows)
                m = tl.load(entry + 4 * num_rows)
                v = tl.load(entry + 5 * num_rows)
                largest = tl.load(entry + 6 * num_rows)
                options = numbers + 2 * num_rows + 8 * group
                lr = learning_rate(table + 7 * num_rows, group, tl.load(options))
                c1, c2 = _corrections(numbers, row, common1, common2, steps, DEVICE_STEPS)
                if tl.load(options + 6) != 0.0:
                    _step_chunk(
                        source, weights, grads, m, v, largest, begin, slot, count, options, lr, c1, c2, factor, key, DTYPE, BLOCK, True, STOCHASTIC
                    )
                else:
                    # m again: there is no maximum to read.
                    _step_chunk(
                        source, weights, grads, m, v, m, begin, slot, count, options, lr, c1, c2, factor, key, DTYPE, BLOCK, False, STOCHASTIC
                    )


def restore_adam(
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
    device_steps: bool,
    common: tuple[float, float],
) -> Any:
    """Launch. What is not listed is as for :func:`sam_fast.kernels.restore_sgd.restore_sgd`.

    Args:
        table: int64 ``[7 * num_rows + 2 * num_groups]``; the states are the step counter, ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``.
        numbers: int64 ``[2 * num_rows + 8 * num_groups]``, float64 bits: for each row ``1 - beta1^t`` and ``sqrt(1 - beta2^t)``, t being the number
            of this step, or 0 and 0 for the ones in ``common``; and for each group ``struct AdamGroup`` (csrc/table.h).
        device_steps: ``numbers`` has ``log2(beta1)`` and ``log2(beta2)`` for each row instead, and the table the addresses of counters (float32) that
            have not counted this step yet. The kernel computes the corrections, within about 2^-52.
        common: the two numbers of most rows. They change with every step, and as arguments they need no copy to the device.
    """
    key, stochastic = signed_key(rounding_key, dtype)
    return restore_adam_kernel[(programs,)](
        chunks,
        chunks.shape[0],
        table,
        num_rows,
        numbers,
        *common,
        flat,
        written,
        ticket,
        grad_scale,
        found_inf,
        key,
        DEVICE_STEPS=device_steps,
        DTYPE=DTYPES[dtype],
        WORD=WORDS[dtype.itemsize][0],
        BLOCK=block_of(dtype),
        STOCHASTIC=stochastic,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
