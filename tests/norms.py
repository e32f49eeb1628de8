"""Layers that keep running statistics, and the oracles of the BatchNorm tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from cases import normal, same_bits
from torch import Tensor, nn

from sam_fast.random_state import RandomState


class MovingNorm(nn.Module):
    """A custom norm, with TensorFlow's names, that updates its statistics in place.

    Its only base class of torch's is nn.Module.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("moving_mean", torch.zeros(features))
        self.register_buffer("moving_variance", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(0), x.var(0)
        if self.training:
            self.moving_mean.lerp_(mean.detach(), 0.1)
            self.moving_variance.lerp_(variance.detach(), 0.1)
        return (x - mean) / (variance + 1e-5).sqrt()


class ReassigningNorm(nn.Module):
    """A custom norm that makes new tensors for its statistics in every forward pass, as much published code
    does.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0)
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
            self.num_batches_tracked = self.num_batches_tracked + 1
        return x - mean


class Kind:
    """A way to make a layer with statistics, and the shape of a batch for it."""

    def __init__(self, make: Callable[[], nn.Module], *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.make = make
        self.shape = shape
        self.dtype = dtype

    def batch(self, seed: int, mean: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (normal(self.shape, generator) * 2.0 + mean).to(self.dtype)


KINDS: dict[str, Kind] = {
    "BatchNorm1d": Kind(lambda: nn.BatchNorm1d(3), 8, 3),
    "BatchNorm1d-sequence": Kind(lambda: nn.BatchNorm1d(3), 8, 3, 5),
    "BatchNorm2d": Kind(lambda: nn.BatchNorm2d(3), 4, 3, 5, 5),
    "BatchNorm3d": Kind(lambda: nn.BatchNorm3d(3), 2, 3, 3, 3, 3),
    "cumulative": Kind(lambda: nn.BatchNorm2d(3, momentum=None), 4, 3, 5, 5),
    "not-affine": Kind(lambda: nn.BatchNorm2d(3, affine=False, momentum=0.3), 4, 3, 5, 5),
    "float64": Kind(lambda: nn.BatchNorm1d(3).double(), 8, 3, dtype=torch.float64),
    "bfloat16": Kind(lambda: nn.BatchNorm1d(3).bfloat16(), 8, 3, dtype=torch.bfloat16),
    "InstanceNorm1d": Kind(lambda: nn.InstanceNorm1d(3, track_running_stats=True), 4, 3, 5),
    "InstanceNorm2d": Kind(lambda: nn.InstanceNorm2d(3, track_running_stats=True), 4, 3, 5, 5),
    "InstanceNorm3d": Kind(lambda: nn.InstanceNorm3d(3, track_running_stats=True), 2, 3, 3, 3, 3),
    "custom-moving": Kind(lambda: MovingNorm(3), 8, 3),
    "custom-reassigning": Kind(lambda: ReassigningNorm(3), 8, 3),
}


def batch(seed: int = 1) -> Tensor:
    """Eight rows of four features, of mean 1."""
    return normal((8, 4), torch.Generator().manual_seed(seed)) + 1.0


def two_norms() -> nn.Module:
    """A model with two norm layers that have seen one batch."""
    model = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=None))
    )
    model(torch.randn(8, 4))
    return model


def statistics(model: nn.Module) -> list[Tensor]:
    """Copies of all buffers of ``model``."""
    return [buffer.detach().clone() for buffer in model.buffers()]


def unchanged(model: nn.Module, before: Sequence[Tensor]) -> bool:
    return same_bits(statistics(model), before)


def forward_only(model: nn.Module, *xs: Tensor) -> list[Tensor]:
    """The oracle: the statistics of a copy of ``model`` after ordinary training-mode passes over ``xs``, in plain
    PyTorch.
    """
    twin = copy.deepcopy(model)
    for x in xs:
        twin(x)
    return statistics(twin)


class Recorder:
    """What the first passes of a SAM run saw: weights, batch and random state of each.

    ``replay`` computes from that what the statistics must be.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.initial = copy.deepcopy(model)
        self.passes: list[tuple[list[Tensor], Tensor, RandomState]] = []

    def first_pass(self, x: Tensor) -> None:
        """Call before every first pass."""
        # With the random state: a statistic behind dropout depends on its masks.
        devices = {p.device for p in self.model.parameters()}
        self.passes.append(([p.detach().clone() for p in self.model.parameters()], x, RandomState.capture(devices)))

    def replay(self) -> list[Tensor]:
        """Only the first passes, one after the other, in plain PyTorch."""
        twin = copy.deepcopy(self.initial)
        for weights, x, random_state in self.passes:
            with torch.no_grad():
                for p, w in zip(twin.parameters(), weights, strict=True):
                    p.copy_(w)
            random_state.apply()
            twin(x)
        return statistics(twin)
