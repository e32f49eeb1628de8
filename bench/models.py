"""What is measured on: the parameter shapes of real models, many tiny tensors, and small real networks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

MODELS: dict[str, list[list[int]]] = json.loads((Path(__file__).parent / "model_shapes.json").read_text())
"""Parameter shapes of real models, by model name."""
TINY, LARGEST = "10,000 tensors of 16", "gpt2"
BY_ELEMENTS = {f"1e{n} in 100": [[10**n // 100]] * 100 for n in range(4, 8)}
BY_TENSORS = {f"1e6 in {10**n}": [[10 ** (6 - n)]] * 10**n for n in range(4)}
SHAPES: dict[str, list[list[int]]] = {
    **MODELS,
    TINY: [[16]] * 10_000,
    **{f"{count} x 8": [[8]] * count for count in (1, 161)},
    **BY_ELEMENTS,
    **BY_TENSORS,
}
"""Of parameters, by the name of the set; of what is not a model's, numbers of elements and tensors are the name."""


LARGE = [name for name, shapes in MODELS.items() if sum(map(math.prod, shapes)) >= 25_000_000]
"""Models that no cache holds: their bandwidth is the memory's."""


def shrink() -> None:
    """Make every set tiny, for a run that only shows that the suite works."""
    for name, shapes in SHAPES.items():
        SHAPES[name] = [[min(n, 4) for n in shape] for shape in shapes[:5]]


def _convolution(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


def convnet() -> nn.Module:
    """Three convolutions with BatchNorm and a linear layer for 28x28 images: 0.1M parameters."""
    blocks = [(*_convolution(i, o), nn.ReLU(), nn.MaxPool2d(2)) for i, o in ((1, 32), (32, 64), (64, 128))]
    layers = [layer for block in blocks for layer in block]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(inputs, outputs, stride), nn.ReLU(), *_convolution(outputs, outputs))
        same = (inputs, stride) == (outputs, 1)
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, stride, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18's four stages of two blocks behind a stem that halves 32x32 images: 11.2M parameters, 62 tensors."""
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [block for i, o, s in stages for block in (_Residual(i, o, s), _Residual(o, o, 1))]
    stem = [*_convolution(3, 64, 2), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def transformer() -> nn.Module:
    """A small encoder that predicts a token at every place: 3.4M parameters. No dropout: a benchmark must be
    repeatable."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(512, 256), encoder, nn.Linear(256, 512), nn.Flatten(0, 1))


def _images(batch: int, channels: int, side: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(batch, channels, side, side), torch.randint(0, 10, (batch,)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "ConvNet, batch 32": (convnet, _images(32, 1, 28)),
    "ConvNet, batch 128": (convnet, _images(128, 1, 28)),
    "ResNet-18, batch 32": (resnet18, _images(32, 3, 32)),
    "transformer, batch 8": (transformer, lambda: (torch.randint(0, 512, (8, 64)), torch.randint(0, 512, (8 * 64,)))),
}
"""Name -> what makes the network, and what makes a batch of inputs and labels: small enough for two cores."""
