"""step: put w back and step as the base optimizer does, in one pass over memory.

This module walks over the tensors. Each base optimizer is a module beside it, with these names, as in its struct in
csrc/steps.h:

    OPTIONS    names of its options, all float64; ``lr`` is the first, ``maximize`` among them
    STATES     names of its states, each with None; the last one may have the name of an option instead, and then exists
               only where that option is not 0
    COUNTS     whether it has step counters; then it has ``counted``, ``bases`` and ``counted_from``, see :mod:`.adam`
    numbers    what ``apply`` takes, from the options, the learning rate and what was counted: computed in float64, once
               for each chunk, and rounded to the dtype of the arithmetic
    apply      the new weights of a block from its weights and gradients. It gets pointers to the states, and loads and
               stores them itself: the fewer values at a time, the fewer registers

``numbers`` and ``apply`` are jit functions. Where the C++ has madd, they have a fused multiply-add.

The address table (int64) has one column for each of: weights; gradients; weights again, but 0 where a tensor is not
saved; step counters, if the base optimizer counts; each state. Then it has for each group the address of a learning
rate on the device, or 0, and its size in bytes. Numbers that may change with every step are in a table of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .copy import WORDS, copy_chunk
from .formulas import load
from .rounding import narrow_weight, random_index, signed_key
from .table import DTYPES, MASKED_BLOCK, NUM_WARPS, WIDTHS, aligned_part, block_for, is_wide, load_chunk

BLOCK_BYTES = 4096
"""Bytes of each array that a program moves at once. Adam has up to nine arrays, so two 16-byte accesses for each of its
128 threads are enough in flight."""


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
def _counted(numbers, tensor, common1, common2, counter, COUNTED_FROM: tl.constexpr):
    """The two numbers that follow from a tensor's step counter."""
    first = tl.load(numbers + 2 * tensor)
    second = tl.load(numbers + 2 * tensor + 1)
    second = tl.where(first == 0.0, common2, second)
    first = tl.where(first == 0.0, common1, first)
    if COUNTED_FROM is not None:
        t = (tl.load(counter.to(tl.pointer_type(tl.float32))) + 1.0).to(tl.float64)
        first, second = COUNTED_FROM(first, second, t)
    return first, second


@triton.jit
def _pointers(addresses, begin, ALIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """Pointers to the element ``begin`` from each address on, known to be aligned to ``ALIGNED`` bytes unless None."""
    pointers = ()
    for i in tl.static_range(len(addresses)):
        pointer = addresses[i].to(tl.pointer_type(DTYPE)) + begin
        if ALIGNED is not None:
            pointer = tl.multiple_of(pointer, ALIGNED)
        pointers += (pointer,)
    return pointers


@triton.jit
def _step_block(
    source,
    arrays,
    at,
    mask,
    numbers,
    scale,
    index,
    key,
    APPLY: tl.constexpr,
    COMPUTE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    w = load(source + at, mask, COMPUTE)
    g = load(arrays[1] + at, mask, COMPUTE) * scale
    states = ()
    for i in tl.static_range(2, len(arrays)):
        states += (arrays[i] + at,)
    w = APPLY(w, g, states, mask, numbers)
    tl.store(arrays[0] + at, narrow_weight(w, arrays[0].dtype.element_ty, index, key, STOCHASTIC), mask=mask)


@triton.jit
def _step_chunk(
    source,
    addresses,
    begin,
    slot,
    count,
    numbers,
    scale,
    key,
    APPLY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """``addresses``: of the tensor's weight, gradient and states; ``source``: where the chunk's weights are read."""
    compute: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    together = source
    for i in tl.static_range(len(addresses)):
        together |= addresses[i]
    done = 0
    for shift in tl.static_range(WIDTHS):
        if is_wide(shift, DTYPE):
            part = aligned_part(together, done, count, shift, BLOCK)
            lanes = tl.arange(0, block_for(shift, BLOCK))
            old = tl.multiple_of(source.to(tl.pointer_type(DTYPE)), 16 >> shift)
            arrays = _pointers(addresses, begin, 16 >> shift, DTYPE)
            for start in range(done, part, block_for(shift, BLOCK)):
                index = random_index(slot, start, lanes)
                _step_block(old, arrays, start + lanes, None, numbers, scale, index, key, APPLY, compute, STOCHASTIC)
            done = part
    old = source.to(tl.pointer_type(DTYPE))
    arrays = _pointers(addresses, begin, None, DTYPE)
    lanes = tl.arange(0, MASKED_BLOCK)
    for start in range(done, count, MASKED_BLOCK):
        at = start + lanes
        index = random_index(slot, start, lanes)
        _step_block(old, arrays, at, at < count, numbers, scale, index, key, APPLY, compute, STOCHASTIC)


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
    NUM_OPTIONS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NUM_STATES: tl.constexpr,
    LAST_STATE_IF: tl.constexpr,
    COUNTS: tl.constexpr,
    COUNTED_FROM: tl.constexpr,
    NUMBERS: tl.constexpr,
    APPLY: tl.constexpr,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    compute: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    itemsize: tl.constexpr = DTYPE.primitive_bitwidth // 8
    factor = _gradient_factor(grad_scale)
    skipped = _is_set(found_inf)
    key = key.to(tl.uint32, bitcast=True)
    numbers = numbers.to(tl.pointer_type(tl.float64))
    of_groups = numbers
    states = table + 3 * num_tensors
    if COUNTS:
        of_groups += 2 * num_tensors
        states += num_tensors
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        tensor, group, begin, count, slot = load_chunk(chunks, chunk)
        weights = tl.load(table + tensor)
        grads = tl.load(table + num_tensors + tensor)
        if grads != 0:
            # Loaded here, not once before the loop: it would be kept on the stack.
            saved = (tl.load(written) == ticket) & (tl.load(table + 2 * num_tensors + tensor) != 0)
            if skipped:
                if saved:
                    # Skipped steps are rare: only accesses of 16 bytes or of one element.
                    copy_chunk(weights, backup, begin, slot, count, False, WORD, BLOCK, 1)
            else:
                source = tl.where(saved, backup.to(tl.int64) + slot * itemsize, weights + begin * itemsize)
                options = ()
                for i in tl.static_range(NUM_OPTIONS):
                    options += (tl.load(of_groups + NUM_OPTIONS * group + i),)
                lr = _learning_rate(states + NUM_STATES * num_tensors, group, options[0])
                scale = tl.where(options[MAXIMIZE] != 0.0, -factor, factor).to(compute)
                counted = None
                if COUNTS:
                    counter = tl.load(table + 3 * num_tensors + tensor)
                    counted = _counted(numbers, tensor, common1, common2, counter, COUNTED_FROM)
                n = NUMBERS(options, lr, counted, compute)
                fewer = (weights, grads)
                for i in tl.static_range(NUM_STATES - 1):
                    fewer += (tl.load(states + i * num_tensors + tensor),)
                every = fewer
                every += (tl.load(states + (NUM_STATES - 1) * num_tensors + tensor),)
                if LAST_STATE_IF is not None:
                    if options[LAST_STATE_IF] != 0.0:
                        _step_chunk(source, every, begin, slot, count, n, scale, key, APPLY, DTYPE, BLOCK, STOCHASTIC)
                    else:
                        _step_chunk(source, fewer, begin, slot, count, n, scale, key, APPLY, DTYPE, BLOCK, STOCHASTIC)
                else:
                    _step_chunk(source, every, begin, slot, count, n, scale, key, APPLY, DTYPE, BLOCK, STOCHASTIC)


def step(
    of: Any,
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
        programs, chunks, num_tensors, backup, ticket, rounding_key: as for :func:`sam_fast.kernels.perturb.perturb`.
        of: the module of the base optimizer.
        table: int64, the address table; tensors without a gradient are left out.
        numbers: int64, float64 bits: if the base optimizer counts, for each tensor the two numbers ``of.counted`` for
            this step, or 0 and 0 for those in ``common``; then for each group its options.
        written: int64, one element. Unless it holds ``ticket`` no backup was written, and all weights are where they
            were.
        grad_scale: float32, one element: gradients are divided by it. Or None.
        found_inf: float32, one element: unless it is 0, saved tensors are only put back and all others stay as they
            are. Or None.
        dtype: that of the tensors and their state.
        device_counters: ``numbers`` has ``of.bases`` for each tensor instead, and the table the addresses of counters
            (float32) that have not counted this step yet.
        common: the two numbers of most tensors. They change with every step, and as arguments they need no copy to the
            device.
    """
    key, stochastic = signed_key(rounding_key, dtype)
    *_, last_state_if = of.STATES.values()
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
        NUM_OPTIONS=len(of.OPTIONS),
        MAXIMIZE=of.OPTIONS.index("maximize"),
        NUM_STATES=len(of.STATES),
        LAST_STATE_IF=None if last_state_if is None else of.OPTIONS.index(last_state_if),
        COUNTS=of.COUNTS,
        COUNTED_FROM=of.counted_from if of.COUNTS and device_counters else None,
        NUMBERS=of.numbers,
        APPLY=of.apply,
        DTYPE=DTYPES[dtype],
        WORD=WORDS[dtype.itemsize][0],
        BLOCK=BLOCK_BYTES // dtype.itemsize,
        STOCHASTIC=stochastic,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
