"""The tasks that the contenders train on: few small images, so that one core does two thousand runs in some hours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from examples.fashion_mnist import data
from examples.fashion_mnist.data import Dataset, split_for_seed


@dataclass(frozen=True)
class Task:
    """Images of Fashion-MNIST, with blocks of 2 x 2 pixels averaged, and how to train on them.

    Attributes:
        images: number of training images, drawn anew for each seed. The test images are Fashion-MNIST's own 10,000.
        noise: share of training labels drawn anew at random.
        pixel_noise: standard deviation of the Gaussian noise in every image, those of the test too; 1 is white. An
            image's noise stays what it is from epoch to epoch.
        epochs: a multiple of 4.
        repeats: multiplies the numbers of seeds, for tasks in which accuracies differ by less.
        lrs, decays: the learning rates and weight decays that tuning tries, all pairs.
        radius: multiplies the radii that tuning tries.
    """

    images: int
    noise: float
    epochs: int
    batch: int
    pixel_noise: float = 0.0
    repeats: int = 1
    radius: float = 1.0
    lrs: tuple[float, ...] = (0.05, 0.1)
    decays: tuple[float, ...] = (5e-3, 1e-2, 2e-2, 4e-2)


TASKS = {
    "A": Task(images=3000, noise=0.5, epochs=20, batch=128),
    "B": Task(
        images=2000,
        noise=0.0,
        epochs=20,
        batch=64,
        pixel_noise=0.5,
        decays=(1e-2, 2e-2, 4e-2, 8e-2),
        radius=2.0,
    ),
}

SUBJECTS = {"A": "wrong labels", "B": "noisy pixels"}
"""What a model can overfit in each task."""


@cache
def fashion_mnist() -> Dataset:
    """Fashion-MNIST at half its resolution: images (n, 1, 14, 14)."""
    return data.fashion_mnist()


def split(task: Task, seed: int) -> Dataset:
    """The images (n, 1, 14, 14) that are trained and tested on with this seed. The test images and their noise are the
    same for all seeds.
    """
    clean = split_for_seed(fashion_mnist(), task.images, task.noise, seed)
    if not task.pixel_noise:
        return clean

    def noisy(images: Tensor, noise_seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(noise_seed)
        return images + task.pixel_noise * torch.randn(images.shape, generator=generator)

    train = noisy(clean.train_images, 1_000_003 + seed)
    test = noisy(clean.test_images, 1_000_000)
    return replace(clean, train_images=train, test_images=test)
