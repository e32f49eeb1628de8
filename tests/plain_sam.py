"""SAM in plain PyTorch, one parameter after the other: the oracle for tests of users' situations and frameworks.

Uses nothing of sam_fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class PlainSAM:
    """``w -> w + e`` with each e added in turn, then back to a copy of w and an ordinary step of the base optimizer."""

    def __init__(
        self,
        params: Iterable[Any],
        base: Any = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        self.base = base(list(params), **options)
        self.rho, self.adaptive = rho, adaptive
        self.old: list[tuple[Tensor, Tensor]] = []
        self.norm = 0.0

    @torch.no_grad()
    def first_step(self) -> None:
        params = [p for group in self.base.param_groups for p in group["params"] if p.grad is not None]
        t = [p.abs() if self.adaptive else torch.ones_like(p) for p in params]
        terms = [(scale * p.grad).abs().double().square().sum() for scale, p in zip(t, params, strict=True)]
        self.norm = float(torch.stack(terms).sum().sqrt()) if terms else 0.0
        self.old = [(p, p.detach().clone()) for p in params]
        if self.norm > 0:
            for scale, p in zip(t, params, strict=True):
                p.add_(scale * scale * p.grad * (self.rho / (self.norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, w in self.old:
            p.copy_(w)
        self.base.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.base.zero_grad()


def furthest(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """The largest difference between two lists of tensors; NaN if one is not finite."""
    differences = [(x.detach() - y.detach()).abs().max() for x, y in zip(a, b, strict=True) if x.numel() > 0]
    return float(torch.stack([d.double() for d in differences]).max())
