"""The images that are trained and tested on: Fashion-MNIST, a folder in its format, or scikit-learn's digits."""

from __future__ import annotations

import gzip
import hashlib
import math
import socket
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import fetch_openml, load_digits
from torch import Tensor
from torch.nn.functional import avg_pool2d

PACKAGE = Path("usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist has its files
FETCHED = Path(__file__).parents[2] / "build/fashion-mnist" / PACKAGE  # by `make data`
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SHA256 = "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f"
"""Of Fashion-MNIST's pixels and labels in the order of FILES."""


@dataclass(frozen=True)
class Dataset:
    """uint8 images (n, height, width) from 0 to ``white``, int64 labels (n,) from 0 to ``classes`` - 1."""

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

    ``mean`` and ``std`` are those of the training pixels.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    mean: float
    std: float


def load(name: str) -> Dataset:
    """``auto`` is Fashion-MNIST, or else the digits with a warning that says why; ``digits``; or a folder.

    Raises:
        OSError, ValueError: a file of the folder cannot be read, or is not what its name says.
    """
    if name == "auto":
        try:
            return fashion_mnist()
        except RuntimeError as error:
            warnings.warn(f"these are scikit-learn's digits. {error}", stacklevel=2)
    return digits() if name in ("auto", "digits") else from_folder(Path(name))


def fashion_mnist() -> Dataset:
    """Fashion-MNIST from Debian's package, else OpenML's with a warning: the same pixels.

    Raises:
        RuntimeError: it cannot be had, or is not what it was.
    """
    folder = next((f for f in (FETCHED, Path("/") / PACKAGE) if f.is_dir()), None)
    try:
        data = from_folder(folder) if folder else from_openml()
        content = hashlib.sha256()
        for t in (data.train_images, data.train_labels, data.test_images, data.test_labels):
            content.update(t.to(torch.uint8).numpy().tobytes())
        if content.hexdigest() != SHA256:
            raise ValueError(f"SHA-256 {content.hexdigest()} is not {SHA256}")
    except (OSError, ValueError) as error:
        where = folder or f"OpenML ({FETCHED} is not there, `make data` makes it)"
        raise RuntimeError(f"Fashion-MNIST could not be had from {where}: {error}") from error
    if folder is None:
        warnings.warn(f"Fashion-MNIST is OpenML's: {FETCHED} is not there, `make data` makes it", stacklevel=2)
    return replace(data, source="Fashion-MNIST")


def from_folder(folder: Path) -> Dataset:
    """The four files of a data set in Fashion-MNIST's format, gzipped or not.

    Raises:
        OSError, ValueError: a file cannot be read, or is not what its name says.
    """
    images, labels, test_images, test_labels = (read_idx(folder / name) for name in FILES)
    if len(images) != len(labels) or len(test_images) != len(test_labels) or images.shape[1:] != test_images.shape[1:]:
        raise ValueError(f"{folder}: numbers of images and labels, or sizes of images, do not match")
    classes = int(labels.max()) + 1
    return Dataset(images, labels.long(), test_images, test_labels.long(), 255, classes, f"images of {folder}")


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes: 0, 0, 8, the number of dimensions, big-endian sizes, the elements."""
    path = path if path.is_file() else path.with_name(f"{path.name}.gz")
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
    dims = 1 if "idx1" in path.name else 3
    begin = 4 + 4 * dims
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, begin, 4)]
    if content[:4] != bytes((0, 0, 8, dims)) or len(content) != begin + math.prod(shape):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes in {dims} dimension(s)")
    return torch.tensor(np.frombuffer(content, np.uint8, offset=begin).reshape(shape))


def from_openml() -> Dataset:
    """Fashion-MNIST as scikit-learn fetches and keeps it: the last 10,000 images are the test's."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        bunch = fetch_openml(data_id=40996, as_frame=False, parser="liac-arff")
    finally:
        socket.setdefaulttimeout(patience)
    images = torch.tensor(bunch.data.astype(np.uint8)).view(-1, 28, 28)
    labels = torch.tensor(bunch.target.astype(np.int64))
    return Dataset(images[:-10_000], labels[:-10_000], images[-10_000:], labels[-10_000:], 255, 10, "OpenML")


def digits() -> Dataset:
    """scikit-learn's 1,797 scans of 8 x 8 pixels; 500 of them, always the same, are the test images."""
    bunch = load_digits()
    images, labels = torch.as_tensor(bunch.images, dtype=torch.uint8), torch.as_tensor(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2019))
    test, train = order[:500], order[500:]
    return Dataset(images[train], labels[train], images[test], labels[test], 16, 10, "scikit-learn's digits")


def halved(data: Dataset) -> Dataset:
    """2 x 2 pixels averaged: a quarter of the work."""

    def half(images: Tensor) -> Tensor:
        return avg_pool2d(images[:, None].float(), 2).round().to(torch.uint8)[:, 0]

    return replace(data, train_images=half(data.train_images), test_images=half(data.test_images))


def split_for_seed(data: Dataset, images: int, label_noise: float, seed: int, *, held_out: bool = False) -> Split:
    """Draw a seed's training images, and draw the labels of a share ``label_noise`` of them anew, from all classes.

    The test images are all there are; with ``held_out``, for tuning, as many training images that were not drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train_images), generator=generator)
    chosen, others = order[:images], order[images : images + len(data.test_images)]
    labels = data.train_labels[chosen]
    redrawn = torch.randperm(images, generator=generator)[: round(label_noise * images)]
    labels[redrawn] = torch.randint(data.classes, (len(redrawn),), generator=generator)
    train = data.train_images[chosen].unsqueeze(1).float() / data.white
    test = (data.train_images[others] if held_out else data.test_images).unsqueeze(1).float() / data.white
    test_labels = data.train_labels[others] if held_out else data.test_labels
    return Split(train, labels, test, test_labels, data.classes, mean=float(train.mean()), std=float(train.std()))
