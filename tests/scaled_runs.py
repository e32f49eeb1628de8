"""A small network in training under a gradient scaler, with any base optimizer."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from cases import batches, values
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from sam_fast import SAM

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
INF, NAN = float("inf"), float("nan")

BASES: dict[str, dict[str, Any]] = {
    "sgd": {"base_optimizer": SGD, "momentum": 0.9},
    "sgd-plain": {"base_optimizer": SGD, "fused": True},
    "sgd-fused": {"base_optimizer": SGD, "momentum": 0.9, "fused": True},
    "sgd-foreach": {"base_optimizer": SGD, "momentum": 0.9, "foreach": True},
    "adamw": {"base_optimizer": AdamW},
    "adamw-fused": {"base_optimizer": AdamW, "fused": True},
}


@functools.cache
def _batches(device: str) -> list[tuple[Tensor, Tensor]]:
    return batches(20)


def batch_of(i: int) -> tuple[Tensor, Tensor]:
    """Batch i, on the default device."""
    return _batches(str(torch.get_default_device()))[i]


class Run:
    """A small network in training, with or without a scaler; the same weights each time.

    perturb_eps is 0: the scale makes a difference to nothing else.
    """

    def __init__(self, options: dict[str, Any], scaler: torch.amp.GradScaler | None = None, clip: bool = False) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
        self.optimizer = SAM(self.model.parameters(), **{"lr": 0.01, "rho": 0.1, "perturb_eps": 0.0, **options})
        self.scaler = torch.amp.GradScaler(torch.get_default_device().type, enabled=False) if scaler is None else scaler
        self.clip = clip
        self.autocast: Callable[[], Any] = contextlib.nullcontext

    def backward(self, x: Tensor, y: Tensor, plant: float | None) -> float:
        with self.autocast():
            loss = cross_entropy(self.model(x), y)
        self.scaler.scale(loss).backward()
        if plant is not None:
            self.model[1].bias.grad[-1] = plant
        return loss.item()

    def step(self, batch: int, first: float | None = None, second: float | None = None) -> float:
        """One step with this batch; ``first`` and ``second`` are planted in the gradients of their pass.

        Returns the first loss.
        """
        loss = self.backward(*batch_of(batch), first)
        self.optimizer.first_step(zero_grad=True)
        self.backward(*batch_of(batch), second)
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss

    @property
    def weights(self) -> list[Tensor]:
        return values(list(self.model.parameters()))

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(self.optimizer.state_dict()["state"])


def scaler_with(
    scale: float = 2.0**12, kind: type[torch.amp.GradScaler] = torch.amp.GradScaler, **options: Any
) -> torch.amp.GradScaler:
    return kind(torch.get_default_device().type, init_scale=scale, **options)
