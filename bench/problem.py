"""What every method is given, and the check that none is timed whose result is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 2
"""That a method makes in the check: the first makes the base optimizer's state, fused second steps begin later."""
PIECE = 1 << 20
"""Elements that the oracle looks at together: float64 temporaries that a cache holds."""


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


@dataclass
class Method:
    """One way to make SAM's step, and the parameters it works on."""

    optimizer: Any
    params: list[nn.Parameter]
    settings: str = ""

    def backward(self, gradients: Sequence[Tensor]) -> Callable[[], None]:
        return backward(self.params, gradients)


@dataclass
class Problem:
    """Weights, gradients and options. The gradients do not depend on the weights."""

    start: list[nn.Parameter]
    base: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=dict)
    rho: float = 0.05
    adaptive: bool = False

    @cached_property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.start if p.grad is not None]

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.start)

    def norm(self) -> float:
        """``||T g||`` in float64."""
        return math.sqrt(math.fsum(float((self._t(w) * g).square_().sum()) for w, g in self._pieces()))

    @cached_property
    def perturbed(self) -> list[Tensor]:
        """w + e in float64, in pieces."""
        scale = self.rho / (self.norm() + 1e-12)
        return [w + self._t(w) ** 2 * g * scale for w, g in self._pieces()]

    @cached_property
    def stepped(self) -> list[Tensor]:
        """The weights after ``STEPS`` steps of the base optimizer in float64, in pieces: the perturbation leaves no
        trace."""
        pieces = []
        for w, g in self._pieces():
            q = nn.Parameter(w)
            q.grad = g
            optimizer = self.base([q], fused=True, **self.options)
            for _ in range(STEPS):
                optimizer.step()
            pieces.append(q.detach())
        return pieces

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        weights, gradients = _flat(self.start), _flat(self.gradients)
        for w, g in zip(weights.split(PIECE), gradients.split(PIECE), strict=True):
            yield w.double(), g.double()

    def _t(self, w: Tensor) -> Tensor | float:
        return w.abs() if self.adaptive else 1.0

    def check(self, name: str, method: Method, norm_error: float = 0.0) -> None:
        """After its first first_step and after ``STEPS`` steps the method must be where float64 says.

        Args:
            norm_error: what the method's norm may be off by, relative. PyTorch's sum over one tensor of 100M float32 is
                off by some per cent.

        Raises:
            AssertionError: it is not.
        """
        make_gradients = method.backward(self.gradients)
        for step in range(STEPS):
            make_gradients()
            method.optimizer.first_step()
            if step == 0:
                check_close(name, method.params, self.perturbed, norm_error * self._largest_perturbation)
            method.optimizer.zero_grad()
            make_gradients()
            method.optimizer.second_step()
            method.optimizer.zero_grad()
        # AdamW's steps are of the size of lr whatever the gradient: one near zero may be rounded to either side of it.
        slack = 0.0 if self.base is torch.optim.SGD else 0.01 * STEPS * float(self.options["lr"])
        check_close(name, method.params, self.stepped, slack)

    @cached_property
    def _largest_perturbation(self) -> float:
        return max(float((p - w).abs().max()) for p, (w, _) in zip(self.perturbed, self._pieces(), strict=True))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def check_close(name: str, params: Sequence[Tensor], wanted: list[Tensor], slack: float) -> None:
    # Rounded once or twice to the parameter's dtype: units in the last place of a weight of sd 0.02, all below 0.2.
    # 16-bit momentum adds more.
    epsilon = torch.finfo(params[0].dtype).eps
    rtol, atol = (max(8 * epsilon, 1e-12), 0.05 * epsilon) if epsilon < 1e-4 else (2 * epsilon, 0.01 * epsilon)
    for got, want in zip(_flat(params).split(PIECE), wanted, strict=True):
        bound = want.abs().mul_(rtol).add_(atol + slack)
        error = got.double().sub_(want).abs_()
        if not bool((error <= bound).all()):  # NaN is not
            off, allowed = float(error.max()), float(bound[error.argmax()])
            raise AssertionError(
                f"{name} is wrong, so it is not timed: off by {off:.3g} where {allowed:.3g} is allowed"
            )
