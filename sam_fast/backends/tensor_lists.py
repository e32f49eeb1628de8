"""The operations on lists of tensors with ``torch._foreach_*``: for every device, dtype (complex too) and layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..rounding import ROUNDED, round_stochastically
from .memory import is_dense

FUSED_HAS_DEFAULT_BITS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
"""Whether PyTorch's fused CPU steps have its default bits: in whole vectors on x86, PyTorch 2.10 to 2.15."""

VECTOR = 64
"""Bytes of the widest vector, and the unit in which the fused steps share tensors out over threads."""

ROW = 64
"""How many squares are added in float32 on the CPU: some 20 roundings, at worst an error of 7e-7 of the norm."""

LARGE = 1 << 14
"""Elements. Gradients with fewer are concatenated."""


def is_on_host(tensor: Tensor) -> bool:
    """Whether reading a number out of it waits for nothing."""
    return tensor.device.type == "cpu"


def squared_norm(terms: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of all squares, in ``dtype``."""
    if not is_on_host(terms[0]):
        wide = dtype.to_complex() if terms[0].is_complex() else dtype
        return torch.stack(torch._foreach_norm(terms, 2, dtype=wide)).square().sum()
    # PyTorch's float32 norm of 1e8 elements was seen to be 3.5 % off; its float64 norm of them takes 30 times as long.
    flat = [_in_memory_order(term) for term in terms]
    large = [x for x in flat if x.dtype == torch.float32 and x.numel() >= LARGE]
    if large:
        ends = [x.numel() // ROW * ROW for x in large]
        rows = [torch.linalg.vector_norm(x[:n].view(-1, ROW), dim=1) for x, n in zip(large, ends, strict=True)]
        total = _dot([torch.cat(rows)], dtype)
        # Squares below 1e-38 may be lost, and large ones infinite: between these bounds neither matters.
        if 1e-30 * sum(ends) < total < math.inf:
            rest = [x[n:] for x, n in zip(large, ends, strict=True)]
            return total + _dot([x for x in flat if x.numel() < LARGE or x.dtype != torch.float32] + rest, dtype)
    return _dot(flat, dtype)


def _dot(flat: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of all squares, each taken in ``dtype``."""
    small = torch.cat([x for x in flat if x.numel() < LARGE] or [flat[0][:0]])
    pieces = (piece for x in (small, *flat) if x is small or x.numel() >= LARGE for piece in x.split(8 * LARGE))
    return torch.stack([torch.dot(x, x) for x in (piece.to(dtype) for piece in pieces)]).sum()


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The elements in one dimension: a view where the tensor is dense."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float32 for the 16-bit formats, else the tensors' own."""
    return torch.float32 if dtype in ROUNDED else dtype


def to_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def asam_t(weights: list[Tensor], eta: float) -> list[Tensor]:
    """ASAM's normalization operator T = |w| + eta; real for complex weights too."""
    t = list(torch._foreach_abs(weights))
    if eta:
        torch._foreach_add_(t, eta)
    return t


def needs_resolving(tensors: list[Tensor]) -> bool:
    """Whether one is not what its memory holds (see resolve_neg, resolve_conj): foreach refuses to write to it."""
    return any(any(map(is_so, tensors)) for is_so in (Tensor.is_neg, Tensor.is_conj, Tensor._is_zerotensor))


def materialized(tensor: Tensor) -> Tensor:
    """The tensor with its sign and conjugation applied, and memory of its own: what fused steps need."""
    return tensor.clone() if tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor() else tensor


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    if needs_resolving(targets):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    elif targets:
        torch._foreach_copy_(targets, sources)


def scale_of(rho: float, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """What gradients are multiplied by. A zero gradient moves nothing, also where the norm, eps included, is 0."""
    most = torch.finfo(dtype).max  # an infinite scale would make NaN of a gradient of 0
    return torch.where(norm > 0, rho / norm, 0.0).clamp(-most, most).to(dtype)


def perturb_tensors(
    weights: list[Tensor],
    backups: list[Tensor],
    grads: list[Tensor],
    scale: Tensor,
    eta: float | None,
    finite: Tensor | None,
    rounding_key: int | None,
) -> None:
    """``w <- w + e``; the backups hold w. ``eta`` is None for SAM. Unless ``finite`` (None is True) nothing moves."""
    dtype = compute_dtype(weights[0].dtype)
    grads = to_dtype(grads, dtype)
    in_place = weights[0].dtype == dtype and not dtype.is_complex and not needs_resolving(weights)
    if in_place and eta is None and finite is None:
        torch._foreach_add_(weights, grads, alpha=float(scale))
        return
    t = None if eta is None else asam_t(to_dtype(backups, dtype), eta)
    e = list(torch._foreach_mul(grads if t is None else torch._foreach_mul(t, grads), scale))
    if t is not None:
        torch._foreach_mul_(e, t)
    if in_place:
        if finite is not None:
            e = [x.masked_fill_(~finite, -0.0) for x in e]  # w + -0.0 has the bits of w
        torch._foreach_add_(weights, e)
        return
    wide = to_dtype(weights, dtype)
    moved = list(torch._foreach_add(wide, e))
    if finite is not None:
        moved = [torch.where(finite, m, w) for m, w in zip(moved, wide, strict=True)]
    copy_all(weights, rounded(moved, backups, rounding_key))


def rounded(values: list[Tensor], backups: list[Tensor], rounding_key: int | None) -> list[Tensor]:
    """New weights, stochastically rounded if they are to be; else the copy into the weights rounds them to nearest."""
    if rounding_key is None or backups[0].dtype not in ROUNDED:
        return values
    found = []
    for value, backup in zip(values, backups, strict=True):
        # An element's position in the bucket is that of its backup.
        positions = torch.arange(backup.numel(), device=backup.device).add_(backup.storage_offset()).to(torch.int32)
        index = positions.as_strided(backup.shape, backup.stride())
        found.append(round_stochastically(value.contiguous(), backup.dtype, index.contiguous(), rounding_key))
    return found


Step = Callable[..., None]
"""``step(fused, weights, gradients, *states)``: a rule's step of one group on lists of tensors."""


def step_tensors(step: Step, columns: Sequence[list[Tensor]], divide: bool, has_fused: bool) -> None:
    """Step with ``columns``: weights, gradients, state. ``divide``: the end of a tensor may be stepped by itself.

    PyTorch's fused step on the CPU assumes that all tensors are laid out as the weight is, and computes other bits
    after the last whole vector of a tensor. So the default step takes what comes after it, or without ``divide`` the
    whole tensor.
    """
    if not has_fused:
        step(False, *columns)
        return
    dtype, device = columns[0][0].dtype, columns[0][0].device
    can = (
        FUSED_HAS_DEFAULT_BITS
        and device.type == "cpu"
        and dtype in (torch.float32, torch.float64)
        and not any(map(needs_resolving, columns))
    )
    line = VECTOR // dtype.itemsize
    strides = zip(*([t.stride() for t in column] for column in columns), strict=True)
    whole: list[Sequence[Tensor]] = []
    others: list[Sequence[Tensor]] = []
    for entry, of_entry in zip(zip(*columns, strict=True), strides, strict=True):
        rest = (n := entry[0].numel()) % line
        alike = can and len({(), *of_entry}) == 2 and is_dense(entry[0])  # () is a step counter's
        if not alike or rest == n or (rest and not divide):
            others.append(entry)
        elif rest:
            flat = [t.as_strided((n,), (1,)) if t.dim() else t for t in entry]
            whole.append([t[:-rest] if t.dim() else t for t in flat])
            others.append([t[-rest:] if t.dim() else t.clone() for t in flat])  # both parts take the same step
        else:
            whole.append(entry)
    for fused, entries in ((False, others), (True, whole)):
        if entries:
            step(fused, *map(list, zip(*entries, strict=True)))


def step_wide(step: Step, columns: Sequence[list[Tensor]], has_fused: bool) -> list[Tensor]:
    """``step_tensors`` in float32, for 16-bit formats: the new weights, which are yet to be rounded."""
    dtype = columns[0][0].dtype
    wide = [[t.float() for t in column] if column[0].dtype == dtype else column for column in columns]
    step_tensors(step, wide, divide=True, has_fused=has_fused)
    for tensors, new in zip(columns[2:], wide[2:], strict=True):
        if new is not tensors:
            torch._foreach_copy_(tensors, new)
    return wide[0]
