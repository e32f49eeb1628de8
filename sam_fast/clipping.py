"""Clipping of the second gradient: one fused norm, and a factor that the second step reads where it reads a scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .amp import Scaling, unscale
from .backends.columns import local_tensor
from .perturbation import Perturbation

IN_PLACE = (torch.float64, torch.float16, torch.complex32, torch.complex64, torch.complex128)
"""Dtypes of gradients that are clipped before the step: a scale is float32 and would round float64's factor; no base
optimizer's own step may unscale the others, of which float16 loses small ones, and GradScaler's operation takes no
complex ones.
"""

EPS = 1e-6
"""Added to the norm, as torch.nn.utils.clip_grad_norm_ does."""


def clipped(perturbation: Perturbation, base: Optimizer, scaling: Scaling, max_norm: float) -> Scaling:
    """The scaling under which the gradients' norm is at most ``max_norm``; nothing waits for a device.

    The norm is that over all gradients of all groups, unscaled. Where the buckets cannot give it, and in the dtypes
    ``IN_PLACE``, gradients are unscaled and clipped in place.

    Args:
        perturbation: its buckets measure the norm.
        base: the base optimizer, whose gradients are meant.
        scaling: what a GradScaler has done to the gradients.
        max_norm: in units of the gradients.
    """
    norm = perturbation.norm_of_gradients(base.param_groups)
    in_place = norm is None or perturbation.holds(IN_PLACE)
    if in_place and scaling.grad_scale is not None:
        unscale(base, scaling.grad_scale)
    if norm is None:
        torch.nn.utils.clip_grad_norm_(with_gradient(base.param_groups), max_norm)
        return Scaling(None, scaling.found_inf)
    scale = torch.ones_like(norm) if scaling.grad_scale is None else scaling.grad_scale.to(norm)
    factor = (max_norm / (norm / scale + EPS)).clamp(max=1.0)
    if not in_place:
        return Scaling((scale / factor).float(), scaling.found_inf)
    for p in with_gradient(base.param_groups):
        grad = local_tensor(p.grad).detach()
        grad *= factor.to(grad.device)
    return Scaling(None, scaling.found_inf)


def with_gradient(param_groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The parameters that have a gradient."""
    return [p for group in param_groups for p in group["params"] if p.grad is not None]
