"""The images that are trained and tested on: Fashion-MNIST, a folder in its format, or scikit-learn's digits."""

import gzip
import hashlib
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
SHA256 = "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f"  # of what is in them, in this order


@dataclass(frozen=True)
class Dataset:
    """float32 images (n, 1, height, width) from 0 to 1, int64 labels (n,) from 0 to ``classes`` - 1."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    source: str


def load(name: str) -> Dataset:
    """``auto`` is Fashion-MNIST, or else the digits with a warning that says why; ``digits``; or a folder.

    Raises OSError or ValueError: a file of the folder cannot be read, or the four are not such a data set.
    """
    if name == "auto":
        try:
            return fashion_mnist()
        except (OSError, ValueError) as error:
            warnings.warn(f"Fashion-MNIST is not available, using scikit-learn's digits: {error}", stacklevel=2)
    return digits() if name in ("auto", "digits") else dataset(read_folder(Path(name)), 255, name)


def fashion_mnist() -> Dataset:
    """Fashion-MNIST from Debian's package, else, with a warning, from OpenML: the same pixels.

    Raises OSError or ValueError: it cannot be loaded, or its checksum is wrong.
    """
    folder = next((f for f in (FETCHED, Path("/") / PACKAGE) if f.is_dir()), None)
    if folder:
        parts = read_folder(folder)
    else:
        warnings.warn(f"loading Fashion-MNIST from OpenML: {FETCHED} is missing, `make data` makes it", stacklevel=2)
        bunch = fetch_openml(data_id=40996, as_frame=False, parser="liac-arff")  # the test's 10,000 images come last
        images, labels = bunch.data.astype(np.uint8).reshape(-1, 28, 28), bunch.target.astype(np.uint8)
        parts = [images[:-10_000], labels[:-10_000], images[-10_000:], labels[-10_000:]]
    content = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    if content != SHA256:
        raise ValueError(f"{folder or 'OpenML'}: SHA-256 {content} is not {SHA256}")
    return dataset(parts, 255, "Fashion-MNIST")


def read_folder(folder: Path) -> list[np.ndarray]:
    """IDX files, gzipped or not: the bytes 0, 0, 8 and the number of dimensions, big-endian sizes, the elements."""
    parts = []
    for name in FILES:
        path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{folder} is no folder with {name} or {name}.gz in it")
        dims = 1 if "idx1" in name else 3
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            magic, *shape = np.frombuffer(content, ">u4", count=1 + dims)
            if magic != 0x800 + dims:
                raise ValueError(f"it begins with {magic:#x}")
            parts.append(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape))
        except (EOFError, ValueError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: not an IDX file of unsigned bytes in {dims} dimension(s): {error}") from error
    return parts


def digits() -> Dataset:
    """scikit-learn's 1,797 scans of 8 x 8 pixels; 500 of them, always the same, are the test images."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(2019)).numpy()
    images, labels = bunch.images[order], bunch.target[order]
    return dataset([images[500:], labels[500:], images[:500], labels[:500]], 16, "scikit-learn's digits")


def dataset(parts: list[np.ndarray], white: int, source: str) -> Dataset:
    """Images (n, height, width) from 0 to ``white`` and labels of training and test as the network takes them.

    In images of 16 x 16 and more, blocks of 2 x 2 pixels are averaged: a quarter of the work.
    """
    images, labels, test_images, test_labels = (torch.tensor(part) for part in parts)
    size = images.shape[1:]
    enough = len(images) == len(labels) >= 256 and len(test_images) == len(test_labels) >= 1 and min(size) >= 4
    if not enough or test_images.shape[1:] != size:
        found = ", ".join(f"{name} {part.shape}" for name, part in zip(FILES, parts, strict=True))
        needed = "256 training images and 1 test image, all of one size of at least 4 x 4, and their labels"
        raise ValueError(f"{source}: this needs at least {needed}, but there are {found}")
    classes = int(labels.max()) + 1
    if test_labels.max() >= classes:
        raise ValueError(f"{source}: test label {int(test_labels.max())} is above all training labels")
    side = 2 if min(size) >= 16 else 1
    images, test_images = (avg_pool2d(x[:, None].float(), side).round() / white for x in (images, test_images))
    return Dataset(images, labels.long(), test_images, test_labels.long(), classes, source)


def split_for_seed(data: Dataset, images: int, label_noise: float, seed: int, *, held_out: bool = False) -> Dataset:
    """Draw a seed's training images, and draw the labels of a share ``label_noise`` of them anew, from all classes.

    The test images are all there are; with ``held_out``, for tuning, as many training images that were not drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train_images), generator=generator)
    chosen, others = order[:images], order[images : images + len(data.test_images)]
    labels = data.train_labels[chosen]
    redrawn = torch.randperm(images, generator=generator)[: round(label_noise * images)]
    labels[redrawn] = torch.randint(data.classes, (len(redrawn),), generator=generator)
    if held_out:
        data = replace(data, test_images=data.train_images[others], test_labels=data.train_labels[others])
    return replace(data, train_images=data.train_images[chosen], train_labels=labels)
