"""What every contender is given, and the check that none is timed whose result is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 2
"""That are made in the check: the first makes the base optimizer's state, fused second steps begin later."""


def make_params(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> list[nn.Parameter]:
    """Parameters like a network's: weights of sd 0.02, gradients of sd 0.001 (never zeros: those are faster)."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = nn.Parameter((torch.randn(list(shape), generator=generator) * 0.02).to(device, dtype))
        p.grad = (torch.randn(list(shape), generator=generator) * 0.001).to(device, dtype)
        params.append(p)
    return params


def copies(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Other parameters with the same weights, without gradients."""
    return [nn.Parameter(p.detach().clone()) for p in params]


def backward(params: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Callable[[], None]:
    """Hands out gradients as a backward pass does: in new memory, last parameter first. ``zero_grad`` frees them."""

    def run() -> None:
        for p, own in zip(reversed(params), reversed(gradients), strict=True):
            if p.grad is None:
                p.grad = own.clone()
            else:
                p.grad.copy_(own)  # flatten=True: gradients stay where they are

    return run


def params_of(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@dataclass
class Problem:
    """Weights, gradients and options. The gradients do not depend on the weights."""

    start: list[nn.Parameter]
    base: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=dict)
    rho: float = 0.05
    adaptive: bool = False

    @property
    def gradients(self) -> list[Any]:
        return [p.grad for p in self.start]

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.start)

    @cached_property
    def norm(self) -> float:
        """``||T g||`` in float64."""
        pairs = _pieces(self.start, self.gradients)
        squares = [((p.double() if self.adaptive else 1.0) * g.double()).square().sum() for p, g in pairs]
        return float(torch.stack(squares).sum().sqrt())

    def check(self, name: str, optimizer: Any, norm_error: float = 0.0) -> None:
        """After its first first_step and after ``STEPS`` steps the optimizer's parameters must be where float64 says:
        gradients stay what they are, so SAM ends where the base optimizer alone does.

        Args:
            norm_error: what the optimizer's norm may be off by, relative.

        Raises:
            AssertionError: they are not.
        """
        params = params_of(optimizer)
        make_gradients = backward(params, self.gradients)
        for step in range(STEPS):
            make_gradients()
            optimizer.first_step()
            if step == 0:
                self.check_perturbed(name, params, norm_error)
            optimizer.zero_grad()
            make_gradients()
            optimizer.second_step()
            optimizer.zero_grad()
        # AdamW's steps are of the size of lr whatever the gradient: one near zero may be rounded to either side of it.
        slack = 0.0 if self.base is torch.optim.SGD else 0.01 * STEPS * float(self.options["lr"])
        for got, p, g in _pieces(params, self.start, self.gradients):
            wanted = nn.Parameter(p.to(torch.float64, copy=True))
            wanted.grad, base = g.double(), self.base([wanted], **self.options)
            for _ in range(STEPS):
                base.step()
            self._close(name, got, wanted.detach(), slack)

    def check_perturbed(self, name: str, got: Sequence[Tensor], norm_error: float = 0.0) -> None:
        """``got`` must be ``w + rho T^2 g / ||T g||``."""
        scale = self.rho / (self.norm + 1e-12)
        for moved, p, g in _pieces(got, self.start, self.gradients):
            w = p.double()
            e = scale * g.double() * (w.square() if self.adaptive else 1.0)
            self._close(name, moved, w + e, norm_error * e.abs())

    def _close(self, name: str, got: Tensor, wanted: Tensor, slack: Tensor | float) -> None:
        # Rounded once or twice to the parameter's dtype: units in the last place of a weight of sd 0.02, all below 0.2.
        # 16-bit momentum adds more.
        epsilon = torch.finfo(self.start[0].dtype).eps
        rtol, atol = (max(8 * epsilon, 1e-12), 0.05 * epsilon) if epsilon < 1e-4 else (2 * epsilon, 0.01 * epsilon)
        error = (got.double() - wanted).abs()
        if not bool((error <= rtol * wanted.abs() + atol + slack).all()):  # NaN is not
            raise AssertionError(f"{name} is wrong, so it is not timed: off by {float(error.max()):.3g}")


def _pieces(*lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """What belongs together in these lists of tensors, in pieces that a cache holds."""
    for tensors in zip(*lists, strict=True):
        yield from zip(*(t.detach().reshape(-1).split(1 << 17) for t in tensors), strict=True)
