"""Runs of SAM with a fused second step, and the same without."""

from __future__ import annotations

from typing import Any

import torch
from cases import give
from torch import nn

from sam_fast import SAM


def two_groups(params: list[nn.Parameter], base: type[torch.optim.Optimizer], **options: Any) -> SAM:
    half = len(params) // 2
    return SAM([{"params": params[:half]}, {"params": params[half:], "lr": 3e-3, "rho": 0.2}], base, lr=1e-2, **options)


def run(optimizer: SAM, params: list[nn.Parameter], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        give(params, 2 * step, 0.01)
        optimizer.first_step()
        give(params, 2 * step + 1, 0.01)
        if step % 5 == 4:
            params[2].grad = None  # its weights are restored, its state stays
        optimizer.second_step()
        assert not optimizer.perturbed


def without(optimizer: SAM) -> SAM:
    """The same optimizer with a hook that does nothing: its second step is restore and the base optimizer's step."""
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer
