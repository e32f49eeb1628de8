"""perturb: back the weights up and move them, ``w <- w + e``, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .formulas import can_perturb, perturb_scale, perturbed, perturbed_adaptive, widen
from .rounding import narrow_weight, random_index, signed_key
from .table import (
    BLOCK,
    DTYPES,
    MASKED_BLOCK,
    NUM_WARPS,
    WIDTHS,
    aligned_part,
    block_for,
    is_wide,
    load_chunk,
    load_group,
)

NORM_BLOCK = 1024


@triton.jit
def _norm_of(partials, num_partials, NORM_BLOCK: tl.constexpr):
    """The norm. Every program adds the same numbers in the same order."""
    sums = tl.zeros((NORM_BLOCK,), tl.float64)
    lanes = tl.arange(0, NORM_BLOCK)
    for start in range(0, num_partials, NORM_BLOCK):
        sums += tl.load(partials + start + lanes, mask=start + lanes < num_partials, other=0.0)
    return tl.sqrt(tl.sum(sums))


@triton.jit
def _move(
    w,
    g,
    saved,
    eta,
    scale,
    moves,
    mask,
    index,
    key,
    COMPUTE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One block: back it up and, if ``moves``, move it."""
    stored = tl.load(w, mask=mask)
    grad = widen(tl.load(g, mask=mask), COMPUTE)
    tl.store(saved, stored, mask=mask)
    weight = widen(stored, COMPUTE)
    if ADAPTIVE:
        moved = perturbed_adaptive(weight, grad, eta, scale)
    else:
        moved = perturbed(weight, grad, scale)
    if moves:
        tl.store(w, narrow_weight(moved, stored.dtype, index, key, STOCHASTIC), mask=mask)


@triton.jit
def _move_chunk(
    weights,
    grads,
    backup,
    begin,
    slot,
    count,
    eta,
    scale,
    moves,
    key,
    DTYPE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    compute: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    eta = eta.to(compute)
    saved = backup.to(tl.pointer_type(DTYPE))
    done = 0
    for shift in tl.static_range(WIDTHS):
        if is_wide(shift, DTYPE):
            part = aligned_part(weights | grads, done, count, shift, BLOCK)
            lanes = tl.arange(0, block_for(shift, BLOCK))
            w = tl.multiple_of(weights.to(tl.pointer_type(DTYPE)) + begin, 16 >> shift)
            g = tl.multiple_of(grads.to(tl.pointer_type(DTYPE)) + begin, 16 >> shift)
            for start in range(done, part, block_for(shift, BLOCK)):
                at = start + lanes
                index = random_index(slot, start, lanes)
                to = saved + tl.multiple_of(slot + start, (128 >> shift) // DTYPE.primitive_bitwidth) + lanes
                _move(w + at, g + at, to, eta, scale, moves, None, index, key, compute, ADAPTIVE, STOCHASTIC)
            done = part
    w = weights.to(tl.pointer_type(DTYPE)) + begin
    g = grads.to(tl.pointer_type(DTYPE)) + begin
    saved += slot
    lanes = tl.arange(0, MASKED_BLOCK)
    for start in range(done, count, MASKED_BLOCK):
        at = start + lanes
        index = random_index(slot, start, lanes)
        _move(w + at, g + at, saved + at, eta, scale, moves, at < count, index, key, compute, ADAPTIVE, STOCHASTIC)


@triton.jit(
    do_not_specialize=["num_chunks", "num_tensors", "num_partials", "ticket", "key"],
    do_not_specialize_on_alignment=["partials", "norm_out"],
)
def perturb_kernel(
    chunks,
    num_chunks,
    table,
    num_tensors,
    partials,
    num_partials,
    eps: tl.float64,
    norm_out,
    backup,
    written,
    ticket,
    key,
    DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM_BLOCK: tl.constexpr,
):
    norm = _norm_of(partials, num_partials, NORM_BLOCK)
    if tl.program_id(0) == 0:
        tl.store(norm_out, norm)
        tl.store(written, ticket)
    moves = can_perturb(norm)
    key = key.to(tl.uint32, bitcast=True)
    for index in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        # Backwards: the gradients that grad_norm read last are the ones still in cache.
        tensor, group, begin, count, slot = load_chunk(chunks, num_chunks - 1 - index)
        weights = tl.load(table + tensor)
        grads = tl.load(table + num_tensors + tensor)
        if grads != 0:
            rho, eta, adaptive = load_group(table + 2 * num_tensors, group)
            scale = perturb_scale(norm, rho, eps, tl.float64 if DTYPE == tl.float64 else tl.float32)
            if adaptive != 0.0:
                _move_chunk(
                    weights, grads, backup, begin, slot, count, eta, scale, moves, key, DTYPE, True, STOCHASTIC, BLOCK
                )
            else:
                _move_chunk(
                    weights, grads, backup, begin, slot, count, eta, scale, moves, key, DTYPE, False, STOCHASTIC, BLOCK
                )


def perturb(
    programs: int,
    chunks: torch.Tensor,
    table: torch.Tensor,
    num_tensors: int,
    partials: torch.Tensor,
    eps: float,
    norm: torch.Tensor,
    backup: torch.Tensor,
    written: torch.Tensor,
    ticket: int,
    rounding_key: int | None,
    dtype: torch.dtype,
) -> Any:
    """Launch. Returns the compiled kernel, None in the interpreter.

    Args:
        programs: how many programs share the chunks out.
        chunks, table, num_tensors, dtype: as for :func:`sam_fast.kernels.grad_norm.grad_norm`.
        partials: float64, any number: they sum to the squared norm.
        eps: added to the norm before it divides rho.
        norm: float64, one element, written.
        backup: uint8, the backup's memory; a multiple of 16 bytes.
        written: int64, one element: receives ``ticket``, the proof for :func:`sam_fast.kernels.copy.restore` that this
            kernel has run.
        ticket: positive.
        rounding_key: 32 bits, for the stochastic rounding of 16-bit weights, or None.
    """
    key, stochastic = signed_key(rounding_key, dtype)
    return perturb_kernel[(programs,)](
        chunks,
        chunks.shape[0],
        table,
        num_tensors,
        partials,
        partials.numel(),
        eps,
        norm,
        backup,
        written,
        ticket,
        key,
        DTYPE=DTYPES[dtype],
        STOCHASTIC=stochastic,
        BLOCK=BLOCK,
        NORM_BLOCK=NORM_BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
