"""The fused second steps: put w back and step as the base optimizer does, in one pass over memory.

The walk is here, for every base optimizer. What is its own, how many states it has and its formula, is a
:class:`Step` in a module that has the name of its rule (sam_fast/steps): sgd.py, adam.py.

The address table (int64) has for each tensor the address of its weight, of its gradient, of its weight again if it is
saved, else 0, of its step counter if there are any, and of each state; then for each group the address of a learning
rate on the device, 0 without one, and its size in bytes. What may change with every step is in a table of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .copy import WORDS, copy_chunk
from .formulas import narrow, widen
from .rounding import narrow_weight, place_of, signed_key
from .table import DTYPES, MASKED_BLOCK, NUM_WARPS, WIDTHS, aligned_part, block_for, is_wide, load_chunk

BLOCK_BYTES = 4096
"""Of each array, moved by a program at once. Adam moves up to nine: two 16-byte accesses per thread are enough."""


@dataclass(frozen=True)
class Step:
    """What a base optimizer's step has of its own, as in csrc/steps.h. The functions are Triton's.

    Args:
        options: how many options a group has, float64 each. The first is the learning rate, the last ``maximize``.
        states: how many states, at most three.
        fewest: how many of them are used at least.
        counts: whether there are step counters.
        used: ``used(options)``: how many states a group uses, ``fewest`` or ``states``; ``options`` points to its options.
        numbers: ``numbers(options, lr, first, second, COMPUTE)``: a tuple of what ``apply`` takes, in the arithmetic's
            dtype; ``first`` and ``second`` are the bias corrections where there are step counters.
        apply: ``apply(w, g, s0, s1, s2, numbers, STATES)``: the new weight, and the new states.
    """

    options: int
    states: int
    fewest: int
    counts: bool
    used: Any
    numbers: Any
    apply: Any


@triton.jit
def _gradient_factor(grad_scale):
    """What gradients are multiplied by, float64: the float32 nearest to ``1 / grad_scale``, or 1 without a scale."""
    if grad_scale is None:
        return tl.full((), 1.0, tl.float64)
    else:
        return (1.0 / tl.load(grad_scale).to(tl.float64)).to(tl.float32).to(tl.float64)


@triton.jit
def _is_set(flag):
    """Whether ``flag``, on the device, is not 0; False without one."""
    if flag is None:
        return False
    else:
        return tl.load(flag) != 0.0


@triton.jit
def _learning_rate(rates, group, lr):
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
def _source(weights, begin, saved, backup, slot, DTYPE: tl.constexpr):
    """The address that a chunk's weights are read from: the backup if the tensor is saved, else the tensor itself."""
    itemsize: tl.constexpr = DTYPE.primitive_bitwidth // 8
    return tl.where(saved, backup.to(tl.int64) + slot * itemsize, weights + begin * itemsize)


@triton.jit
def _bias_correction(log2_beta, t):
    """1 - beta^t in float64, within about 2^-52."""
    return 1.0 - tl.exp2(t * log2_beta)


@triton.jit
def _corrections(numbers, tensor, common1, common2, steps, DEVICE_COUNTERS: tl.constexpr):
    """``1 - beta1^t`` and ``sqrt(1 - beta2^t)`` of one tensor."""
    first = tl.load(numbers + 2 * tensor)
    second = tl.load(numbers + 2 * tensor + 1)
    second = tl.where(first == 0.0, common2, second)
    first = tl.where(first == 0.0, common1, first)
    if DEVICE_COUNTERS:
        t = (tl.load(steps.to(tl.pointer_type(tl.float32))) + 1.0).to(tl.float64)
        first = _bias_correction(first, t)
        second = tl.sqrt(_bias_correction(second, t))
    return first, second


@triton.jit
def _step_block(
    source,
    w,
    g,
    s0,
    s1,
    s2,
    mask,
    place,
    scale,
    numbers,
    key,
    APPLY: tl.constexpr,
    COMPUTE: tl.constexpr,
    STATES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One block."""
    stored = tl.load(source, mask=mask)
    weight = widen(stored, COMPUTE)
    grad = widen(tl.load(g, mask=mask), COMPUTE) * scale
    a = weight
    b = weight
    c = weight
    if STATES > 0:
        a = widen(tl.load(s0, mask=mask), COMPUTE)
    if STATES > 1:
        b = widen(tl.load(s1, mask=mask), COMPUTE)
    if STATES > 2:
        c = widen(tl.load(s2, mask=mask), COMPUTE)
    moved, a, b, c = APPLY(weight, grad, a, b, c, numbers, STATES)
    if STATES > 0:
        tl.store(s0, narrow(a, stored.dtype), mask=mask)
    if STATES > 1:
        tl.store(s1, narrow(b, stored.dtype), mask=mask)
    if STATES > 2:
        tl.store(s2, narrow(c, stored.dtype), mask=mask)
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
    factor,
    key,
    NUMBERS: tl.constexpr,
    APPLY: tl.constexpr,
    OPTIONS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    compute: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    pointer: tl.constexpr = tl.pointer_type(DTYPE)
    scale = tl.where(tl.load(options + OPTIONS - 1) != 0.0, -factor, factor).to(compute)
    numbers = NUMBERS(options, lr, correction1, correction2, compute)
    # What there is not lies where something else does.
    second = second if STATES > 1 else first
    third = third if STATES > 2 else second
    addresses = source | weights | grads | first | second | third if STATES > 0 else source | weights | grads
    done = 0
    for shift in tl.static_range(WIDTHS):
        if is_wide(shift, DTYPE):
            part = aligned_part(addresses, done, count, shift, BLOCK)
            lanes = tl.arange(0, block_for(shift, BLOCK))
            s = tl.multiple_of(source.to(pointer), 16 >> shift)
            w = tl.multiple_of(weights.to(pointer) + begin, 16 >> shift)
            g = tl.multiple_of(grads.to(pointer) + begin, 16 >> shift)
            a = tl.multiple_of(first.to(pointer) + begin, 16 >> shift)
            b = tl.multiple_of(second.to(pointer) + begin, 16 >> shift)
            c = tl.multiple_of(third.to(pointer) + begin, 16 >> shift)
            for start in range(done, part, block_for(shift, BLOCK)):
                at = start + lanes
                place = place_of(slot, start, lanes)
                _step_block(
                    s + at,
                    w + at,
                    g + at,
                    a + at,
                    b + at,
                    c + at,
                    None,
                    place,
                    scale,
                    numbers,
                    key,
                    APPLY,
                    compute,
                    STATES,
                    STOCHASTIC,
                )
            done = part
    s = source.to(pointer)
    w = weights.to(pointer) + begin
    g = grads.to(pointer) + begin
    a = first.to(pointer) + begin
    b = second.to(pointer) + begin
    c = third.to(pointer) + begin
    lanes = tl.arange(0, MASKED_BLOCK)
    for start in range(done, count, MASKED_BLOCK):
        at = start + lanes
        place = place_of(slot, start, lanes)
        _step_block(
            s + at,
            w + at,
            g + at,
            a + at,
            b + at,
            c + at,
            at < count,
            place,
            scale,
            numbers,
            key,
            APPLY,
            compute,
            STATES,
            STOCHASTIC,
        )


@triton.jit(
    do_not_specialize=["num_chunks", "num_tensors", "ticket", "key"],
    do_not_specialize_on_alignment=["grad_scale", "found_inf"],
)
def step_kernel(
    chunks,
    num_chunks,
    table,
    num_tensors,
    numbers,
    common1: tl.float64,
    common2: tl.float64,
    backup,
    written,
    ticket,
    grad_scale,
    found_inf,
    key,
    USED: tl.constexpr,
    NUMBERS: tl.constexpr,
    APPLY: tl.constexpr,
    OPTIONS: tl.constexpr,
    STATES: tl.constexpr,
    FEWEST: tl.constexpr,
    COUNTS: tl.constexpr,
    DEVICE_COUNTERS: tl.constexpr,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    skipped = _is_set(found_inf)
    key = key.to(tl.uint32, bitcast=True)
    numbers = numbers.to(tl.pointer_type(tl.float64))
    counters: tl.constexpr = 1 if COUNTS else 0
    for index in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        tensor, group, begin, count, slot = load_chunk(chunks, index)
        entry = table + tensor
        weights = tl.load(entry)
        grads = tl.load(entry + num_tensors)
        if grads != 0:
            # Here, not once: the answer would be kept on the stack.
            saved = (tl.load(written) == ticket) & (tl.load(entry + 2 * num_tensors) != 0)
            if skipped:
                if saved:
                    # Skipped steps are rare: only 16 bytes or one element.
                    copy_chunk(weights, backup, begin, slot, count, False, WORD, BLOCK, 1)
            else:
                source = _source(weights, begin, saved, backup, slot, DTYPE)
                states = entry + (3 + counters) * num_tensors
                first = tl.load(states) if STATES > 0 else weights
                second = tl.load(states + num_tensors) if STATES > 1 else weights
                third = tl.load(states + 2 * num_tensors) if STATES > 2 else weights
                factor = _gradient_factor(grad_scale)
                options = numbers + 2 * counters * num_tensors + OPTIONS * group
                lr = _learning_rate(table + (3 + counters + STATES) * num_tensors, group, tl.load(options))
                c1 = common1
                c2 = common2
                if COUNTS:
                    steps = tl.load(entry + 3 * num_tensors)
                    c1, c2 = _corrections(numbers, tensor, common1, common2, steps, DEVICE_COUNTERS)
                if FEWEST == STATES:
                    _step_chunk(
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
                        c1,
                        c2,
                        factor,
                        key,
                        NUMBERS,
                        APPLY,
                        OPTIONS,
                        DTYPE,
                        BLOCK,
                        STATES,
                        STOCHASTIC,
                    )
                elif USED(options) == STATES:
                    _step_chunk(
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
                        c1,
                        c2,
                        factor,
                        key,
                        NUMBERS,
                        APPLY,
                        OPTIONS,
                        DTYPE,
                        BLOCK,
                        STATES,
                        STOCHASTIC,
                    )
                else:
                    _step_chunk(
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
                        c1,
                        c2,
                        factor,
                        key,
                        NUMBERS,
                        APPLY,
                        OPTIONS,
                        DTYPE,
                        BLOCK,
                        FEWEST,
                        STOCHASTIC,
                    )


def step(
    rule: Step,
    programs: int,
    chunks: torch.Tensor,
    table: torch.Tensor,
    num_tensors: int,
    numbers: torch.Tensor,
    backup: torch.Tensor,
    written: torch.Tensor,
    ticket: int,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    rounding_key: int | None,
    dtype: torch.dtype,
    device_counters: bool = False,
    common: tuple[float, float] = (1.0, 1.0),
) -> Any:
    """Launch. Returns the compiled kernel, None in the interpreter.

    Args:
        rule: of the base optimizer's module.
        programs: how many programs share the chunks out.
        chunks: int64 ``[num_chunks, 5]``, the chunk table.
        table: int64, see the module; tensors without a gradient are left out.
        num_tensors: number of tensors of the bucket.
        numbers: int64, float64 bits: for each group its options; and where there are step counters before that for each
            tensor ``1 - beta1^t`` and ``sqrt(1 - beta2^t)``, t being the number of this step, or 0 and 0 for ``common``.
        backup: uint8, the backup's memory; a multiple of 16 bytes.
        written: int64, one element. Unless it holds ``ticket`` no backup was written, and all weights are where they were.
        ticket: positive.
        grad_scale: float32, one element: gradients are divided by it. Or None.
        found_inf: float32, one element: unless it is 0, saved tensors are only put back and all others stay. Or None.
        rounding_key: 32 bits, for the stochastic rounding of 16-bit weights, or None.
        dtype: that of the tensors and their state.
        device_counters: ``numbers`` has ``log2(beta1)`` and ``log2(beta2)`` for each tensor instead, and the table the
            addresses of counters (float32) that have not counted this step yet. The kernel computes the corrections,
            within about 2^-52.
        common: the two numbers of most tensors. They change with every step; as arguments they need no copy.
    """
    key, stochastic = signed_key(rounding_key, dtype)
    return step_kernel[(programs,)](
        chunks,
        chunks.shape[0],
        table,
        num_tensors,
        numbers,
        *common,
        backup,
        written,
        ticket,
        grad_scale,
        found_inf,
        key,
        USED=rule.used,
        NUMBERS=rule.numbers,
        APPLY=rule.apply,
        OPTIONS=rule.options,
        STATES=rule.states,
        FEWEST=rule.fewest,
        COUNTS=rule.counts,
        DEVICE_COUNTERS=device_counters,
        DTYPE=DTYPES[dtype],
        WORD=WORDS[dtype.itemsize][0],
        BLOCK=BLOCK_BYTES // dtype.itemsize,
        STOCHASTIC=stochastic,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
