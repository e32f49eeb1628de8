"""Training one model with one optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from sam_fast import SAM

from .data import Split
from .errors import DemoError
from .metrics import evaluate
from .model import StoredIn, build_model
from .settings import BASES, OPTIMIZERS, WEIGHTS, Settings


@dataclass
class Curves:
    """One figure per epoch.

    Losses are means over the epoch (nats), accuracies 0 to 1, training accuracy against the randomised labels.
    """

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)


class Stopwatch:
    """Adds up the wall time of the blocks run under ``with watch.running()``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def build_optimizer(name: str, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of an ``OPTIMIZERS`` name over all parameters of the model."""
    choice = OPTIMIZERS[name]
    base = BASES[choice.base]
    base_class: Any = getattr(torch.optim, base.cls)
    options: dict[str, Any] = {"lr": settings.lr_of(choice.base), **base.options}
    if choice.sam:
        sam_options: dict[str, Any] = {
            "rho": settings.rho,
            "adaptive": settings.adaptive,
            "stochastic_rounding": settings.stochastic_rounding,
        }
        return SAM(model.parameters(), base_class, **sam_options, **options)
    optimizer: torch.optim.Optimizer = base_class(model.parameters(), **options)
    return optimizer


def batches(images: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """The images (n, ...) and labels (n,) in random order, cut into full batches; what is left over at the end sits out
    this epoch.
    """
    size = min(batch_size, len(labels))
    order = torch.randperm(len(labels), generator=generator)
    return [(images[chosen], labels[chosen]) for chosen in order.split(size) if len(chosen) == size]


def train(name: str, split: Split, settings: Settings, seed: int) -> tuple[nn.Module, Curves]:
    """Train a new model with the optimizer ``name``, with a progress bar per epoch.

    The seed fixes the initial weights and the batches, whatever the optimizer. The learning rate follows half a cosine
    down to 0.

    Raises:
        DemoError: the loss became infinite or NaN.
    """
    model: nn.Module = build_model(split.classes, split.mean, split.std, seed)
    if settings.weights != "float32":
        model = StoredIn(model, WEIGHTS[settings.weights])
    optimizer = build_optimizer(name, model, settings)
    order = torch.Generator().manual_seed(seed)
    steps = settings.epochs * (len(split.train_labels) // min(settings.batch_size, len(split.train_labels)))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    curves = Curves()
    for epoch in range(1, settings.epochs + 1):
        todo = batches(split.train_images, split.train_labels, settings.batch_size, order)
        title = f"seed {seed}  {OPTIMIZERS[name].label:<9} epoch {epoch:>2}/{settings.epochs}"
        with tqdm(total=len(todo), desc=title, unit="batch", mininterval=0.5, dynamic_ncols=True) as bar:
            _train_epoch(model, optimizer, scheduler, todo, bar, curves)
            loss, accuracy = evaluate(model, split.test_images, split.test_labels)
            curves.test_loss.append(loss)
            curves.test_accuracy.append(accuracy)
            _show(bar, curves.train_loss[-1], curves.train_accuracy[-1], accuracy)
        if not math.isfinite(curves.train_loss[-1]) or not math.isfinite(loss):
            raise DemoError(
                f"{OPTIMIZERS[name].label}, seed {seed}: the loss became {curves.train_loss[-1]} in epoch {epoch}; try "
                "a smaller --lr"
            )
    return model, curves


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    todo: list[tuple[Tensor, Tensor]],
    bar: Any,
    curves: Curves,
) -> None:
    """One pass over the batches ``todo``, shown on ``bar``; appends the epoch's training figures to ``curves``."""
    model.train()
    in_optimizer = Stopwatch()
    losses, correct, seen = 0.0, 0, 0
    start = time.perf_counter()
    for x, y in todo:
        logits = model(x)
        loss = cross_entropy(logits, y)
        loss.backward()
        if isinstance(optimizer, SAM):
            with in_optimizer.running():
                optimizer.first_step(zero_grad=True)
            with optimizer.second_pass(model):
                cross_entropy(model(x), y).backward()
            with in_optimizer.running():
                optimizer.second_step(zero_grad=True)
        else:
            with in_optimizer.running():
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
        seen += len(y)
        losses += float(loss.detach()) * len(y)
        correct += int((logits.detach().argmax(dim=1) == y).sum())
        _show(bar, losses / seen, correct / seen)
        bar.update()
    curves.seconds.append(time.perf_counter() - start)
    curves.optimizer_seconds.append(in_optimizer.seconds)
    curves.train_loss.append(losses / seen)
    curves.train_accuracy.append(correct / seen)


def _show(bar: Any, loss: float, accuracy: float, test_accuracy: float | None = None) -> None:
    text = f"loss {loss:.3f}, acc {accuracy:.1%}"
    if test_accuracy is None:
        bar.set_postfix_str(text, refresh=False)
    else:
        bar.set_postfix_str(f"{text}, test acc {test_accuracy:.1%}")
