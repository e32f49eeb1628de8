"""Real networks, small enough for two cores: what a whole training iteration is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def convnet() -> nn.Module:
    """Three convolutions with BatchNorm and a linear layer for 28x28 images: 0.1M parameters."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]

    return nn.Sequential(
        *block(1, 32), *block(32, 64), *block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
    )


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = (inputs, stride) == (outputs, 1)
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18's four stages of two blocks behind a stem that halves 32x32 images: 11.2M parameters, 62 tensors."""
    blocks = [_Residual(i, o, s) for i, o, s in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))]
    second = [_Residual(o, o, 1) for o in (64, 128, 256, 512)]
    stages = [layer for pair in zip(blocks, second, strict=True) for layer in pair]
    stem = [nn.Conv2d(3, 64, 3, 2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Transformer(nn.Module):
    """A small encoder with learned positions that predicts a token at every place: 3.4M parameters.

    No dropout: a benchmark must be repeatable.
    """

    def __init__(self, tokens: int = 512, width: int = 256, layers: int = 4, length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embedding(x) + self.positions)).transpose(1, 2)
        return out


@dataclass(frozen=True)
class Network:
    """A network, its batch of inputs and labels."""

    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


def _images(batch: int, channels: int, side: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(batch, channels, side, side), torch.randint(0, 10, (batch,)))


NETWORKS: dict[str, Network] = {
    "ConvNet, batch 32": Network(convnet, _images(32, 1, 28)),
    "ConvNet, batch 128": Network(convnet, _images(128, 1, 28)),
    "ResNet-18, batch 32": Network(resnet18, _images(32, 3, 32)),
    "transformer, batch 8": Network(
        Transformer, lambda: (torch.randint(0, 512, (8, 64)), torch.randint(0, 512, (8, 64)))
    ),
}
