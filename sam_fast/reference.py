"""SAM in plain PyTorch, one parameter at a time: the tests' oracle and the benchmarks' baseline.

It states the algorithm as directly as PyTorch allows and optimizes nothing: operation for operation it does what the
public implementation that people copy today (davda54/sam) does, so that "n times faster than the reference" says what
they gain (tests/test_reference.py compares the operations). Run it on float64 parameters for an oracle, on float32 for
a baseline. Sharpness-Aware Minimization: Foret et al., https://arxiv.org/abs/2010.01412; ASAM: Kwon et al.,
https://arxiv.org/abs/2102.11600.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class ReferenceSAM:
    """SAM around ``base_optimizer`` with the two-call interface ``first_step`` / ``second_step``.

    ``rho``, ``adaptive``, ``eta`` and ``perturb`` may be overridden per parameter group. Parameters whose ``.grad`` is
    None are left alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 0.0,
        perturb_eps: float = 1e-12,
        **base_kwargs: Any,
    ) -> None:
        self.base_optimizer = base_optimizer(params, **base_kwargs)
        self.perturb_eps = perturb_eps
        self.old: dict[Tensor, Tensor] = {}
        self.grad_norm: Tensor | None = None
        for group in self.param_groups:
            for name, value in (("rho", rho), ("adaptive", adaptive), ("eta", eta), ("perturb", True)):
                group.setdefault(name, value)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    def _perturbed_groups(self) -> list[tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]]:
        return [
            (group, [(p, p.grad) for p in group["params"] if p.grad is not None])
            for group in self.param_groups
            if group["perturb"]
        ]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norms = [(grad * _t(p, group)).norm() for group, pairs in self._perturbed_groups() for p, grad in pairs]
        self.grad_norm = torch.stack(norms).norm() if norms else torch.zeros(())
        for group, pairs in self._perturbed_groups():
            rho = -group["rho"] if group.get("maximize", False) else group["rho"]
            scale = rho / (self.grad_norm + self.perturb_eps)
            for p, grad in pairs:
                self.old[p] = p.detach().clone()
                e = grad * _t_squared(p, group) * scale.to(p)
                p.add_(e)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p, old in self.old.items():
            p.data = old
        self.old.clear()
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none)


def _t(p: Tensor, group: dict[str, Any]) -> Tensor | float:
    """ASAM's normalization operator T = |w| + eta; 1 for SAM."""
    if not group["adaptive"]:
        return 1.0
    return p.abs() + group["eta"] if group["eta"] else p.abs()


def _t_squared(p: Tensor, group: dict[str, Any]) -> Tensor | float:
    # Without eta it is w^2, as the public implementation has it: no need of |w|.
    return p**2 if group["adaptive"] and not group["eta"] else _t(p, group) ** 2
