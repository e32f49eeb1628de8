"""Everything a demo run depends on, and the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class OptimizerChoice:
    """One curve of the demo: a base optimizer of ``torch.optim``, alone or inside SAM."""

    label: str
    base: str
    sam: bool


@dataclass(frozen=True)
class BaseOptimizer:
    """A class of ``torch.optim`` by name, its default learning rate, and its other options."""

    cls: str
    lr: float
    options: dict[str, Any]


@dataclass(frozen=True)
class DatasetDefaults:
    """What ``--train-size`` and ``--epochs`` are when not given."""

    title: str
    train_size: int
    epochs: int


OPTIMIZERS: dict[str, OptimizerChoice] = {
    "sgd": OptimizerChoice("SGD", "sgd", sam=False),
    "sam": OptimizerChoice("SAM", "sgd", sam=True),
    "adamw": OptimizerChoice("AdamW", "adamw", sam=False),
    "sam-adamw": OptimizerChoice("SAM+AdamW", "adamw", sam=True),
}
BASES: dict[str, BaseOptimizer] = {
    "sgd": BaseOptimizer("SGD", lr=0.1, options={"momentum": 0.9, "weight_decay": 5e-4}),
    "adamw": BaseOptimizer("AdamW", lr=2e-3, options={"weight_decay": 0.05}),
}
DATASETS: dict[str, DatasetDefaults] = {
    "fashion-mnist": DatasetDefaults("Fashion-MNIST", train_size=10_000, epochs=12),
    "digits": DatasetDefaults("scikit-learn digits", train_size=1_000, epochs=20),
}
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RHO = 0.05
RHO_ADAPTIVE = 0.5  # ASAM's ball is measured relative to the weights, so its radius is about ten times larger


@dataclass(frozen=True)
class Settings:
    """The settings of one demo run.

    Sizes count images. ``lr`` None means each base optimizer's own default. ``noise_levels`` are standard deviations in
    units of the full pixel range (0 = black, 1 = white). The landscape is sampled at ``landscape_points`` equally
    spaced steps in [-``landscape_span``, ``landscape_span``] along ``landscape_directions`` random directions.
    ``weights`` names the format that weight matrices are kept in, a key of ``WEIGHTS``.
    """

    dataset: str
    data: Path | None
    train_size: int
    label_noise: float
    epochs: int
    batch_size: int
    lr: float | None
    rho: float
    adaptive: bool
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    threads: int | None
    weights: str = "float32"
    stochastic_rounding: bool | None = None
    noise_levels: tuple[float, ...] = (0.25, 0.5)
    sharpness_images: int = 1_000
    landscape_images: int = 1_000
    landscape_directions: int = 3
    landscape_points: int = 21
    landscape_span: float = 1.0

    def lr_of(self, base: str) -> float:
        """The initial learning rate for a base optimizer of ``BASES``."""
        return BASES[base].lr if self.lr is None else self.lr
