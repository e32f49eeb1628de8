"""What the contenders train on: small images, so that one processor core does some thousand runs in a night."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from sam_fast.demo.data import Dataset, Split, load, split_for_seed
from sam_fast.demo.model import WIDTHS, Standardise


@dataclass(frozen=True)
class Task:
    """A training set and how long it is trained on.

    Attributes:
        images: number of training images, drawn anew for each seed.
        noise: share of training labels drawn anew at random.
        epochs: a multiple of 4.
        lrs, decays: the learning rates and weight decays that tuning tries for SGD, all pairs.
        repeats: multiplies the numbers of seeds: a test set that is small needs more of them.
    """

    source: str
    images: int
    noise: float
    epochs: int
    batch: int
    lrs: tuple[float, ...]
    decays: tuple[float, ...]
    repeats: int = 1


TASKS = {
    "A": Task("fashion-mnist", 3000, 0.5, 20, 128, lrs=(0.025, 0.05, 0.1), decays=(1e-2, 2e-2, 4e-2)),
    "B": Task("digits", 200, 0.0, 60, 32, lrs=(0.05, 0.1, 0.2), decays=(5e-4, 2.5e-3, 1.25e-2), repeats=3),
}


@cache
def dataset(source: str) -> Dataset:
    """Fashion-MNIST, its 2 x 2 pixels averaged: (n, 14, 14); or scikit-learn's 1,797 digits, (n, 8, 8), all of them training images."""
    raw = load(source, None, print)
    if source == "digits":
        images, labels = torch.cat([raw.train_images, raw.test_images]), torch.cat([raw.train_labels, raw.test_labels])
        return Dataset(images, labels, images[:0], labels[:0], raw.white, raw.classes, raw.source)

    def halved(images: Tensor) -> Tensor:
        return avg_pool2d(images[:, None].float(), 2).round().to(torch.uint8)[:, 0]

    train, test = halved(raw.train_images), halved(raw.test_images)
    return Dataset(train, raw.train_labels, test, raw.test_labels, raw.white, raw.classes, raw.source)


def split(task: Task, seed: int) -> Split:
    """A seed's training images; the test images are Fashion-MNIST's own 10,000, and the 1,597 digits that are not trained on."""
    data = dataset(task.source)
    if task.source == "digits":
        order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
        train, test = order[: task.images], order[task.images :]
        images, labels = data.train_images, data.train_labels
        data = Dataset(images[train], labels[train], images[test], labels[test], data.white, data.classes, data.source)
    return split_for_seed(data, task.images, task.noise, seed)


def network(data: Split, seed: int) -> nn.Sequential:
    """The demo's network of 98,682 weights, without its last pooling as the images are small. The same seed, the same weights.

    Returns:
        A network from images (n, 1, height, width) to logits (n, classes).
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
