"""One run: a contender trained on a task with one seed."""

from __future__ import annotations

import ctypes
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from bench.quality.contenders import CONTENDERS, Trainer
from bench.quality.tasks import TASKS, split
from examples.fashion_mnist.model import evaluate, network

SHARPNESS_RHO = 0.05


@dataclass(frozen=True)
class Run:
    """What determines a run's result."""

    task: str
    contender: str
    lr: float
    weight_decay: float
    rho: float
    seed: int


def fix_allocator() -> None:
    """Let glibc keep freed memory: by default each pass maps its activations anew, which costs more than the pass."""
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def train(run: Run) -> dict[str, Any]:
    """Train, and evaluate after the LAST epoch.

    A run whose loss is no longer finite ends there, with the accuracy of guessing and no sharpness.

    Returns:
        A dictionary.
        accuracy: in percent, on the test images; train_accuracy: against the labels that were trained on.
        loss: mean cross-entropy on the test images, nats.
        sharpness: mean of L(w + e) - L(w) over training batches, e the batch's own gradient scaled to length 0.05.
        cost: passes counted, relative to SGD's over the task's epochs.
        climbed: share of the steps that were perturbed.
        seconds: processor time.
    """
    start = time.process_time()
    task, contender = TASKS[run.task], CONTENDERS[run.contender]
    data = split(task, run.seed)
    model = network(data, run.seed)
    in_epoch = task.images // task.batch
    steps = round(contender.epochs * task.epochs) * in_epoch
    trainer = Trainer(model, contender, steps=steps, rho=run.rho, lr=run.lr, weight_decay=run.weight_decay)
    generator = torch.Generator().manual_seed(run.seed)
    finite = True
    while trainer.step < steps and finite:
        order = torch.randperm(task.images, generator=generator)[: in_epoch * task.batch]
        for chosen in order.split(task.batch):
            loss = trainer.train_batch(data.train_images[chosen], data.train_labels[chosen])
        finite = math.isfinite(float(loss))
    measured: dict[str, Any] = {"accuracy": 100 / data.classes, "sharpness": None, "diverged": True}
    test_loss, accuracy = evaluate(model, data.test_images, data.test_labels) if finite else (math.nan, 0.0)
    if math.isfinite(test_loss):
        images, labels = data.train_images, data.train_labels
        measured = {
            "accuracy": round(accuracy, 3),
            "train_accuracy": round(evaluate(model, images, labels)[1], 3),
            "loss": round(test_loss, 5),
            "sharpness": round(sharpness(model, images, labels, rho=SHARPNESS_RHO, batch_size=task.batch), 5),
            "diverged": False,
        }
    return measured | {
        "cost": round(trainer.cost / (task.epochs * in_epoch * task.batch), 4),
        "climbed": round(trainer.climbed / steps, 4),
        "seconds": round(time.process_time() - start, 2),
    }


def sharpness(model: nn.Module, images: Tensor, labels: Tensor, *, rho: float, batch_size: int = 128) -> float:
    """Mean over batches of L(w + e) - L(w), in nats, with e = rho * g / ||g|| along the batch's own gradient g.

    In plain PyTorch, like all that judges the contenders. Measured in evaluation mode; the model is left in training
    mode. A batch whose gradient is 0 adds nothing.
    """
    params = dict(model.named_parameters())
    total = 0.0
    model.eval()
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        loss = cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, list(params.values()))
        with torch.no_grad():
            norm = torch.stack([g.norm() for g in grads]).norm()
            if norm > 0:
                moved = {name: p + rho * g / norm for (name, p), g in zip(params.items(), grads, strict=True)}
                total += float(cross_entropy(functional_call(model, moved, (x,)), y) - loss) * len(y)
    model.train()
    return total / len(labels)
