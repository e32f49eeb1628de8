"""The images and labels a run trains and tests on, and the randomising of labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import DemoError
from .fetch import Log, load_fashion_mnist

_DIGITS_TEST = 500
_DIGITS_SPLIT_SEED = 2019  # any number: it fixes which digits are the test images, the same for all runs
MIN_SIDE = 8


@dataclass(frozen=True)
class Dataset:
    """A data set as it comes: uint8 images (n, height, width) from 0 to ``white``, int64 labels (n,) from 0 to
    ``classes`` - 1.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    white: int
    classes: int
    source: str


@dataclass(frozen=True)
class Split:
    """What one seed trains and tests on: float32 images (n, 1, height, width) in [0, 1], int64 labels (n,).

    ``wrong`` is the share of training labels that randomising made wrong; ``mean`` and ``std`` are those of the
    training pixels.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    wrong: float
    mean: float
    std: float


def load(name: str, folder: Path | None, log: Log) -> Dataset:
    """Load a data set by its ``--dataset`` name.

    Raises:
        DemoError: it cannot be had or is not usable; the message says what to do.
    """
    return _digits() if name == "digits" else _fashion_mnist(folder, log)


def _digits() -> Dataset:
    """scikit-learn's 1,797 scans of 8x8 pixels; 500 of them, always the same, are the test images."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.uint8)
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_DIGITS_SPLIT_SEED))
    test, train = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    return Dataset(
        images[train], labels[train], images[test], labels[test], white=16, classes=10, source="scikit-learn"
    )


def _fashion_mnist(folder: Path | None, log: Log) -> Dataset:
    raw = load_fashion_mnist(folder, log)
    if min(raw.train_images.shape[1:]) < MIN_SIDE:
        raise DemoError(
            f"{raw.source}: images of {tuple(raw.train_images.shape[1:])} pixels, the network needs at least "
            f"{MIN_SIDE} x {MIN_SIDE}"
        )
    if len(raw.train_labels) == 0 or len(raw.test_labels) == 0:
        raise DemoError(f"{raw.source}: there are no images in it")
    classes = int(torch.cat([raw.train_labels, raw.test_labels]).max()) + 1
    if classes < 2:
        raise DemoError(f"{raw.source}: all labels are 0, there is nothing to learn")
    train_labels, test_labels = raw.train_labels.to(torch.int64), raw.test_labels.to(torch.int64)
    return Dataset(
        raw.train_images, train_labels, raw.test_images, test_labels, white=255, classes=classes, source=raw.source
    )


def randomise_labels(labels: Tensor, classes: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Draw ``round(fraction * n)`` of the labels anew, uniformly from all classes (so one in ``classes`` of those stays
    right by chance).

    Args:
        labels: int64 (n,); left as it is.
    """
    noisy = labels.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    noisy[chosen] = torch.randint(classes, (len(chosen),), generator=generator)
    return noisy


def split_for_seed(dataset: Dataset, train_size: int, label_noise: float, seed: int) -> Split:
    """Draw the training images of a seed and randomise some of their labels. The test images are always all of them,
    with their true labels.

    Raises:
        DemoError: ``train_size`` is more than there is, or all of its pixels are alike.
    """
    available = len(dataset.train_images)
    if train_size > available:
        raise DemoError(f"--train-size {train_size}: only {available:,} training images are available")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:train_size]
    true_labels = dataset.train_labels[chosen]
    labels = randomise_labels(true_labels, dataset.classes, label_noise, generator)
    images = _to_float(dataset.train_images[chosen], dataset.white)
    std = float(images.std())
    if not std > 0:
        raise DemoError("the training images are all of one colour, there is nothing to learn")
    return Split(
        train_images=images,
        train_labels=labels,
        test_images=_to_float(dataset.test_images, dataset.white),
        test_labels=dataset.test_labels,
        classes=dataset.classes,
        wrong=float((labels != true_labels).float().mean()),
        mean=float(images.mean()),
        std=std,
    )


def _to_float(images: Tensor, white: int) -> Tensor:
    return images.unsqueeze(1).to(torch.float32) / white
