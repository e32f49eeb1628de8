"""Clipping of the second gradient: one fused norm, and a factor that the second step applies like a scaler's scale."""

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
"""Dtypes whose gradients are clipped in place before the step. A scale is float32, and would round the factor of
float64. The others cannot be unscaled for a base optimizer that steps by itself: float16 would lose small gradients,
and GradScaler's operation takes no complex ones.
"""

EPS = 1e-6
"""Added to the norm, as torch.nn.utils.clip_grad_norm_ does."""


def clipped(perturbation: Perturbation, base: Optimizer, scaling: Scaling, max_norm: float) -> Scaling:
    """The scaling under which the gradients' norm is at most ``max_norm``; nothing waits for a device.

    The norm is taken over all gradients of all groups, unscaled. Where the buckets cannot measure it, and for the
    dtypes ``IN_PLACE``, gradients are unscaled and clipped in place.
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
