"""The network, and how well it does."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from .data import Dataset


class Standardise(nn.Module):
    """Subtracts the mean of the training pixels and divides by their standard deviation."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.mean, self.std = float(images.mean()), float(images.std())

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def network(data: Dataset, seed: int) -> nn.Sequential:
    """Four convolutions with BatchNorm; 98,682 weights for 10 classes. Same seed, same weights.

    Returns:
        A network from images (n, 1, height, width), at least 4 x 4, to logits (n, classes). Weights are channels_last,
        the faster layout on a CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [Standardise(data.train_images)]
        for inputs, width in pairwise((1, 16, 32, 64, 128)):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            if width < 64:
                layers.append(nn.MaxPool2d(2))
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, data.classes)]
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy in percent. The model is left in training mode."""
    model.eval()
    logits = torch.cat([model(x) for x in images.split(500)])
    model.train()
    correct = int((logits.argmax(dim=1) == labels).sum())
    return float(nn.functional.cross_entropy(logits.double(), labels)), 100 * correct / len(labels)
