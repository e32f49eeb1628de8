"""The demo's network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

WIDTHS = (16, 32, 64, 128)


class Standardise(nn.Module):
    """Subtracts the mean of the training pixels and divides by their standard deviation, so that noise can be stated in
    pixel units outside.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class StoredIn(nn.Module):
    """A network whose weights are kept in a format that the arithmetic is not done in: they widen to float32 whenever
    they are used.

    Weights with fewer than two dimensions (biases, normalisation) stay in float32, as mixed-precision recipes have it.

    Args:
        network: its weights are converted in place.
        dtype: the format.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        for p in network.parameters():
            if p.dim() >= 2:
                p.data = p.data.to(dtype)
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        wide = {name: p.float() for name, p in self.network.named_parameters()}
        logits: Tensor = functional_call(self.network, wide, (images,))
        return logits


def build_model(classes: int, mean: float, std: float, seed: int) -> nn.Sequential:
    """Four convolutions with BatchNorm, three of them followed by pooling, then a global average and one linear layer;
    98,682 weights for 10 classes.

    Args:
        classes: number of outputs.
        mean, std: of the training pixels.
        seed: the same seed gives the same initial weights.

    Returns:
        A network from images (n, 1, height, width), at least 8 x 8, to logits (n, classes). Weights are channels_last,
        the faster layout on a CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [Standardise(mean, std)]
        channels = 1
        for width in WIDTHS:
            if channels > 1:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
        model: Any = nn.Sequential(*layers)
        channels_last: nn.Sequential = model.to(memory_format=torch.channels_last)
        return channels_last
