"""The network, and what is measured on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .data import Split

WIDTHS = (16, 32, 64, 128)
NOISE_SEED = 20200000


class Standardise(nn.Module):
    """Subtracts the mean of the training pixels and divides by their standard deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def network(data: Split, seed: int) -> nn.Sequential:
    """Four convolutions with BatchNorm; 98,682 weights for 10 classes. Same seed, same weights.

    Returns:
        A network from images (n, 1, height, width), at least 4 x 4, to logits (n, classes). Weights are channels_last,
        the faster layout on a CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [Standardise(data.mean, data.std)]
        for i, (inputs, width) in enumerate(zip((1, *WIDTHS), WIDTHS, strict=False)):
            if i in (1, 2):
                layers.append(nn.MaxPool2d(2))
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], data.classes)]
        model: nn.Sequential = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        return model


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy (0 to 1). The model is left in training mode."""
    loss, correct = 0.0, 0
    model.eval()
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        logits = model(x)
        loss += float(cross_entropy(logits, y, reduction="sum"))
        correct += int((logits.argmax(dim=1) == y).sum())
    model.train()
    return loss / len(labels), correct / len(labels)


def noisy(images: Tensor, sd: float) -> Tensor:
    """The images plus Gaussian noise of standard deviation ``sd``, where white is 1; the same at every call."""
    return images + sd * torch.randn(images.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
