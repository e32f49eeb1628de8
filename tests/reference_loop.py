"""The reference's loop, step by step: what the tests of statistics between its steps share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import SmallNet, batches
from norms import MovingNorm, ReassigningNorm, Recorder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sam_fast import SAM, disable_running_stats, enable_running_stats


class MixedNet(nn.Module):
    """A native layer, one that updates in place, one that makes new tensors, a cumulative average."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.InstanceNorm2d(4, track_running_stats=True)
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(144, 9),
            MovingNorm(9),
            nn.ReLU(),
            ReassigningNorm(9),
            nn.BatchNorm1d(9),
            nn.Linear(9, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


every_net = pytest.mark.parametrize("make", [SmallNet, MixedNet])


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    cross_entropy(model(x), y).backward()


def reference_step(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor, end: str = "second_step") -> None:
    enable_running_stats(model)
    backward(model, x, y)
    optimizer.first_step(zero_grad=True)
    disable_running_stats(model)
    backward(model, x, y)
    if end == "second_step":
        optimizer.second_step(zero_grad=True)
    elif end == "step":
        optimizer.step()
        optimizer.zero_grad()
    else:
        optimizer.restore()
        optimizer.zero_grad()


def plain_step(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    """The trap, unless statistics are disabled for good: both passes count."""
    backward(model, x, y)
    optimizer.first_step(zero_grad=True)
    backward(model, x, y)
    optimizer.second_step(zero_grad=True)


def trained(
    make: Callable[[], nn.Module], end: str = "second_step", steps: int = 3
) -> tuple[nn.Module, SAM, list[Tensor]]:
    """A model after some steps of the reference's loop, and the statistics that it must have."""
    model = make()
    optimizer, recorder = SAM(model.parameters(), lr=0.1, rho=0.1), Recorder(model)
    for x, y in batches(steps):
        recorder.first_pass(x)
        reference_step(model, optimizer, x, y, end)
    return model, optimizer, recorder.replay()


def load(model: nn.Module) -> None:
    torch.manual_seed(7)
    state = {k: torch.randn_like(v).abs() if v.is_floating_point() else v + 40 for k, v in model.state_dict().items()}
    model.load_state_dict(state)
