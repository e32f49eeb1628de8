"""A model of the optimizer that is slow and obviously correct: what each call must do, from a snapshot taken before it.

Nothing is carried along but the weights at which the step began. The perturbation is computed in float64 by the paper's
formula, one parameter at a time; the base optimizer's step is taken by a copy of the base optimizer itself, on copies
of the parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from cases import flattened
from torch import Tensor

from sam_fast import SAM

Params = list[Any]


def params_of(optimizer: SAM) -> Params:
    found: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    return list(found.values())


def wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)


def as_laid_out(values: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` with the strides of ``like``, gaps included: PyTorch's kernels for 16-bit formats round differently
    where there are gaps.
    """
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype).copy_(values)


def perturbed(optimizer: SAM, eps: float, outside: Collection[int] = ()) -> tuple[float, list[tuple[Any, Tensor]]]:
    """The norm, and for each parameter that moves ``w + e`` in float64 (all of them, unmoved, where the norm is not
    finite). ``outside``: with ``flatten=True``, ids of frozen parameters that are in no flat buffer.
    """
    terms, moving = [], []
    for group in optimizer.param_groups:
        for p in group["params"] if group["perturb"] else []:
            if p.grad is not None:
                t = wide(p).abs() + group["eta"] if group["adaptive"] else torch.ones((), dtype=torch.float64)
                terms.append((t * wide(p.grad)).abs().square().sum())
                moving.append((p, group, t))
            elif group["adaptive"] and flattened(optimizer) and id(p) not in outside and not p.isfinite().all():
                # docs/guarantees.md: not told from a gradient of zeros
                terms.append(torch.tensor(math.nan, dtype=torch.float64))
    norm = float(torch.stack(terms).sum().sqrt()) if terms else 0.0
    finite = norm - norm == 0.0
    results = []
    for p, group, t in moving:
        rho = -group["rho"] if group.get("maximize") else group["rho"]
        e = rho * t**2 * wide(p.grad) / (norm + eps) if finite and norm + eps > 0 else 0.0
        results.append((p, wide(p) + e))
    return norm, results


def stepped(optimizer: SAM, weights: list[Tensor], *, widen: bool = False) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The weights and state after the base optimizer's own step from ``weights`` with the gradients that are there now.

    With ``widen`` the 16-bit formats are stepped in float32 and rounded at the end, as the base optimizer does with
    ``fused=True``.
    """
    base = copy.deepcopy(optimizer.base_optimizer)
    own = [p for group in base.param_groups for p in group["params"]]
    for p, twin, w in zip(params_of(optimizer), own, weights, strict=True):
        dtype = torch.float32 if widen and p.dtype in (torch.bfloat16, torch.float16) else p.dtype
        twin.data = as_laid_out(w, p, dtype)
        twin.grad = None if p.grad is None else as_laid_out(p.grad.detach(), p.grad, dtype)
        if dtype != p.dtype and twin in base.state:
            base.state[twin] = {
                name: value.to(dtype) for name, value in base.state[twin].items() if isinstance(value, Tensor)
            }
    base.step()
    return [p.detach().to(w.dtype, copy=True) for p, w in zip(own, weights, strict=True)], [
        base.state.get(p, {}) for p in own
    ]
