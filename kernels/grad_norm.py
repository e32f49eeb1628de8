"""grad_norm: the squared norm ``||T g||^2`` of a bucket, as one float64 partial sum per program."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .formulas import norm_term, norm_term_adaptive, widen
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


@triton.jit
def _squares(w, g, eta, mask, ADAPTIVE: tl.constexpr):
    """The squares of one block's terms.

    Elements are float64 before anything is computed: the square of a float32 is exact there.
    """
    other: tl.constexpr = None if mask is None else 0.0
    grad = widen(tl.load(g, mask=mask, other=other), tl.float64)
    if ADAPTIVE:
        term = norm_term_adaptive(widen(tl.load(w, mask=mask, other=other), tl.float64), grad, eta)
    else:
        term = norm_term(grad)
    return term * term


@triton.jit
def _add_chunk(
    sums,
    narrow,
    rest,
    weights,
    grads,
    begin,
    count,
    eta,
    DTYPE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    addresses = weights | grads if ADAPTIVE else grads
    done = aligned_part(addresses, 0, count, 0, BLOCK)
    w = tl.multiple_of(weights.to(tl.pointer_type(DTYPE)) + begin, 16)
    g = tl.multiple_of(grads.to(tl.pointer_type(DTYPE)) + begin, 16)
    for start in range(0, done, BLOCK):
        sums += _squares(w + start + lanes, g + start + lanes, eta, None, ADAPTIVE)
    for shift in tl.static_range(1, WIDTHS):
        if is_wide(shift, DTYPE):
            part = aligned_part(addresses, done, count, shift, BLOCK)
            if done < part:
                # Separate sums, since their elements are in another order. They take registers, so they live no longer
                # than necessary.
                own_lanes = tl.arange(0, block_for(shift, BLOCK))
                own = tl.zeros((block_for(shift, BLOCK),), tl.float64)
                w = tl.multiple_of(weights.to(tl.pointer_type(DTYPE)) + begin, 16 >> shift)
                g = tl.multiple_of(grads.to(tl.pointer_type(DTYPE)) + begin, 16 >> shift)
                for start in range(done, part, block_for(shift, BLOCK)):
                    own += _squares(w + start + own_lanes, g + start + own_lanes, eta, None, ADAPTIVE)
                narrow += tl.sum(own)
            done = part
    w = weights.to(tl.pointer_type(DTYPE)) + begin
    g = grads.to(tl.pointer_type(DTYPE)) + begin
    lanes = tl.arange(0, MASKED_BLOCK)
    for start in range(done, count, MASKED_BLOCK):
        rest += _squares(w + start + lanes, g + start + lanes, eta, start + lanes < count, ADAPTIVE)
    return sums, narrow, rest


@triton.jit(do_not_specialize=["num_chunks", "num_tensors"], do_not_specialize_on_alignment=["partials"])
def grad_norm_kernel(chunks, num_chunks, table, num_tensors, partials, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float64)
    narrow = tl.full((), 0.0, tl.float64)
    rest = tl.zeros((MASKED_BLOCK,), tl.float64)
    for index in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        tensor, group, begin, count, _slot = load_chunk(chunks, index)
        weights = tl.load(table + tensor)
        grads = tl.load(table + num_tensors + tensor)
        if grads != 0:
            _rho, eta, adaptive = load_group(table + 2 * num_tensors, group)
            if adaptive != 0.0:
                sums, narrow, rest = _add_chunk(
                    sums, narrow, rest, weights, grads, begin, count, eta, DTYPE, True, BLOCK
                )
            else:
                sums, narrow, rest = _add_chunk(
                    sums, narrow, rest, weights, grads, begin, count, eta, DTYPE, False, BLOCK
                )
    tl.store(partials + tl.program_id(0), tl.sum(sums) + narrow + tl.sum(rest))


def grad_norm(
    chunks: torch.Tensor, table: torch.Tensor, num_tensors: int, partials: torch.Tensor, dtype: torch.dtype
) -> None:
    """Launch one program for each element of ``partials``.

    Args:
        chunks: int64 ``[num_chunks, 5]``, the chunk table.
        table: int64 ``[2 * num_tensors + 3 * num_groups]``: addresses of the weights, of the gradients, and the group
            table's float64 bits.
        num_tensors: number of tensors of the bucket.
        partials: float64, written: partial sums of the squared norm.
        dtype: that of the tensors.
    """
    grad_norm_kernel[(partials.numel(),)](chunks, chunks.shape[0], table, num_tensors, partials, **_options(dtype))


def compiled(chunks: torch.Tensor, dtype: torch.dtype) -> Any:
    """Compile the kernel that :func:`grad_norm` launches: the number of partial sums depends on its registers."""
    return grad_norm_kernel.warmup(chunks, 7, torch.int64, 7, torch.float64, grid=(1,), **_options(dtype))


def _options(dtype: torch.dtype) -> dict[str, Any]:
    # The squares of float32 and the 16-bit formats are exact, so that fusing saves an instruction and changes no bit.
    return {"DTYPE": DTYPES[dtype], "BLOCK": BLOCK, "num_warps": NUM_WARPS, "enable_fp_fusion": True}
