"""The contenders, each a choice of when and where to climb, and a training step of any of them in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

FORWARD, BACKWARD_INPUTS, BACKWARD_WEIGHTS = 1 / 3, 1 / 3, 1 / 3
"""Parts of one sample's pass; together the 1.00 that an SGD step costs for each sample."""

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Contender:
    """What a step does before the gradient that it descends along is computed.

    Attributes:
        along: the direction u of the perturbation: None (SGD), "gradient" (this batch's, from a first pass),
            "previous" (the gradient that the last step was made with), "momentum" (SGD's buffer),
            "friendly" (this batch's gradient less its running mean).
        rhos: the radii that tuning tries; the perturbation is ``sign * rho * u / ||u||``.
        rows: the first pass sees rows 0, ``rows``, 2 * ``rows``, ... of the batch.
        every: the steps that climb: those whose number is a multiple of it.
        between: the direction of the other steps, None or "previous".
        start: the share of all steps after which climbing begins.
        norms_only: perturb the weights of normalization layers alone; the first pass computes no other gradients.
        counts: the pass whose batch counts in BatchNorm's statistics where there are two.
        epochs: how many times the task's epochs.
    """

    along: str | None = "gradient"
    rhos: tuple[float, ...] = (0.0,)
    rows: int = 1
    every: int = 1
    between: str | None = None
    start: float = 0.0
    sign: float = 1.0
    norms_only: bool = False
    counts: str = "first"
    epochs: float = 1.0
    decay: float = 0.9  # of Friendly-SAM's running mean

    def direction(self, step: int, steps: int) -> str | None:
        """The direction of step ``step`` of ``steps``, counted from 0."""
        if step < self.start * steps:
            return None
        return self.along if step % self.every == 0 else self.between


def around(middle: float, factor: float = 2.0, number: int = 5) -> tuple[float, ...]:
    """``number`` radii, ``factor`` apart, with ``middle`` in the middle."""
    return tuple(round(middle * factor**i, 6) for i in range(-(number // 2), number - number // 2))


CONTENDERS: dict[str, Contender] = {
    "sgd": Contender(None),
    "sam": Contender(rhos=around(0.05)),
    "quarter": Contender(rhos=around(0.05), rows=4),
    "every4": Contender(rhos=around(0.2), every=4),
    "previous": Contender("previous", rhos=around(0.1)),
    "late-half": Contender(rhos=around(0.1), start=0.5),
    "late-quarter": Contender(rhos=around(0.1), start=0.75),
    "eighth": Contender(rhos=around(0.05), rows=8),
    "every4+previous": Contender(rhos=around(0.1), every=4, between="previous"),
    "quarter-late-half": Contender(rhos=around(0.1), rows=4, start=0.5),
    "quarter-late-quarter": Contender(rhos=around(0.1), rows=4, start=0.75),
    "sgd-1.25x": Contender(None, epochs=1.25),
    "sgd-2x": Contender(None, epochs=2.0),
    "momentum+": Contender("momentum", rhos=around(0.3, 3.0)),
    "momentum-": Contender("momentum", rhos=around(0.3, 3.0), sign=-1.0),
    "quarter-second-counts": Contender(rhos=around(0.05), rows=4, counts="second"),
    "every2": Contender(rhos=around(0.1), every=2),
    "half": Contender(rhos=around(0.05), rows=2),
    "norms": Contender(rhos=around(0.2), norms_only=True),
    "norms-quarter": Contender(rhos=around(0.2), norms_only=True, rows=4),
    "friendly": Contender("friendly", rhos=around(0.05)),
}
"""In the order in which they run: those most worth knowing about come first."""

TITLES = {
    "sgd": "SGD",
    "sam": "SAM",
    "quarter": "first pass on 1/4 of the batch",
    "every4": "every 4th step",
    "previous": "along the previous gradient",
    "late-half": "the last half of the steps",
    "late-quarter": "the last quarter of the steps",
    "eighth": "first pass on 1/8",
    "every4+previous": "every 4th step, previous gradient in between",
    "quarter-late-half": "first pass on 1/4, the last half of the steps",
    "quarter-late-quarter": "first pass on 1/4, the last quarter of the steps",
    "sgd-1.25x": "SGD, 1.25 times the epochs",
    "sgd-2x": "SGD, twice the epochs",
    "momentum+": "along the momentum",
    "momentum-": "against the momentum",
    "quarter-second-counts": "first pass on 1/4, the second counts in BatchNorm",
    "every2": "every 2nd step",
    "half": "first pass on 1/2",
    "norms": "normalization layers only",
    "norms-quarter": "normalization layers only, first pass on 1/4",
    "friendly": "Friendly-SAM",
}


class Trainer:
    """Trains a model with SGD and a contender's perturbations.

    Args:
        model: trained in place.
        steps: how many steps there will be; the learning rate follows half a cosine down to 0.
        rho: radius of the perturbation.

    Attributes:
        cost: passes counted so far, in samples; one SGD step costs its batch's size.
        climbed: the number of steps that were perturbed.
    """

    def __init__(
        self,
        model: nn.Module,
        contender: Contender,
        *,
        steps: int,
        rho: float,
        lr: float,
        weight_decay: float,
    ) -> None:
        self.model, self.contender, self.steps, self.rho = model, contender, steps, rho
        self.params = list(model.parameters())
        norms = [m for m in model.modules() if isinstance(m, NORMS)]
        self.counting = [m for m in norms if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.perturbed = [p for m in norms for p in m.parameters()] if contender.norms_only else self.params
        self.optimizer = torch.optim.SGD(self.params, lr, momentum=0.9, weight_decay=weight_decay)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)
        self.mean: list[Tensor] | None = None
        self.step, self.climbed, self.cost = 0, 0, 0.0

    def train_batch(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on a batch (n, ...) with labels (n,); returns the loss of the pass that the step descends from."""
        direction = self.contender.direction(self.step, self.steps)
        first_pass = direction in ("gradient", "friendly")
        u = self._first_pass(x, y) if first_pass else self._kept(direction)
        if direction == "friendly":
            u = self._less_mean(u)
        backup = self._climb(u) if u is not None else None
        loss, grads = self._pass(x, y, self.params, count=not first_pass or self.contender.counts == "second")
        if backup is not None:
            with torch.no_grad():
                torch._foreach_copy_(self.perturbed, backup)
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return loss

    def _pass(
        self,
        x: Tensor,
        y: Tensor,
        wanted: Sequence[Tensor],
        *,
        count: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the gradients of ``wanted``; ``count``: the batch counts in BatchNorm's statistics."""
        for m in self.counting:
            m.momentum = 0.1 if count else 0.0
        loss = cross_entropy(self.model(x), y)
        weights = BACKWARD_WEIGHTS if wanted is self.params else 0.0
        self.cost += len(y) * (FORWARD + BACKWARD_INPUTS + weights)
        return loss.detach(), torch.autograd.grad(loss, wanted)

    def _first_pass(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """The gradient of every ``rows``-th row, of the weights that are perturbed."""
        k = self.contender.rows
        return list(self._pass(x[::k], y[::k], self.perturbed, count=self.contender.counts == "first")[1])

    def _kept(self, direction: str | None) -> list[Tensor] | None:
        """A direction that costs no pass; None where there is none (yet)."""
        if direction is None or self.step == 0:
            return None
        if direction == "previous":
            return [p.grad for p in self.params if p.grad is not None]
        state: Any = self.optimizer.state
        return [state[p]["momentum_buffer"] for p in self.params]

    def _less_mean(self, u: list[Tensor]) -> list[Tensor]:
        """Friendly-SAM: m moves towards u, then this returns u - m. m is 0 before the first step."""
        if self.mean is None:
            self.mean = [torch.zeros_like(g) for g in u]
        torch._foreach_lerp_(self.mean, u, 1 - self.contender.decay)
        return list(torch._foreach_sub(u, self.mean))

    @torch.no_grad()
    def _climb(self, u: list[Tensor]) -> list[Tensor]:
        backup = [p.clone() for p in self.perturbed]
        norm = torch.stack(torch._foreach_norm(u)).norm()
        scale = self.contender.sign * self.rho / (norm + 1e-12)
        torch._foreach_add_(self.perturbed, torch._foreach_mul(u, scale))
        self.climbed += 1
        return backup
