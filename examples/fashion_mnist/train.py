"""The rows of the table, and the training of one of them with one seed."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sam_fast import SAM, Schedule, TrainStep
from sam_fast.sharpness import rho_sharpness

from .data import Dataset
from .model import evaluate, network

BATCH = 128
POINTS = 8  # of the curve of accuracy over time
NOISE, NOISE_SEED = 0.25, 20200000  # standard deviation of the noise in the test images' pixels; white is 1
SHARPNESS_RHO = 0.05  # the same ball for all rows


@dataclass(frozen=True)
class Row:
    """How a row trains. ``rho`` 0 is SGD alone; ``start`` and ``ascent`` are Schedule's and TrainStep's."""

    title: str
    lr: float
    weight_decay: float
    rho: float = 0.0
    epochs: int = 1  # times those of the others
    start: float = 0.0
    ascent: float = 1.0


ROWS = {
    "sgd": Row("SGD", 0.1, 0.02),
    "sgd-2x": Row("SGD, twice the steps", 0.1, 0.02, epochs=2),
    "sam": Row("SAM", 0.05, 0.02, rho=0.05),
    "quarter-late-quarter": Row(
        "SAM, first pass on 1/4, the last quarter of the steps", 0.05, 0.02, rho=0.2, start=0.75, ascent=1 / 4
    ),
}
"""By their names in bench/quality, which chose learning rates and weight decays (task A); ``--tune`` chose rho.
The last one is the cheapest that docs/quality.md accepts."""


@dataclass(frozen=True)
class Run:
    """What came out of one training: accuracies in percent, sharpness in nats.

    ``seconds`` are the processor's, of training alone; ``curve`` has (seconds, test accuracy) every so many steps.
    """

    row: str
    seed: int
    steps: int
    seconds: float
    accuracy: float
    noisy: float
    sharpness: float
    curve: list[tuple[float, float]]


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of a batch."""
    return nn.functional.cross_entropy(model(x), y)


def train(name: str, row: Row, data: Dataset, seed: int, epochs: int) -> Run:
    """Train and measure. A seed has the same weights and batches in all rows; the learning rate follows half a cosine.

    Raises FloatingPointError: the loss is no longer finite.
    """
    images, labels = data.train_images, data.train_labels
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=generator) for _ in range(row.epochs * epochs)]
    batches = torch.stack(orders)[:, : len(labels) // BATCH * BATCH].reshape(-1, BATCH)  # full batches only
    steps = len(batches)
    model = network(data, seed)
    optimizer = torch.optim.SGD(model.parameters(), row.lr, momentum=0.9, weight_decay=row.weight_decay)
    if row.rho:
        optimizer = SAM(optimizer, rho=row.rho, schedule=Schedule(start=row.start, total=steps))
        sam_step = TrainStep(model, optimizer, loss_fn, ascent=row.ascent)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    marks = {math.ceil(steps * i / POINTS) for i in range(1, POINTS + 1)}
    seconds, curve = 0.0, []
    title = f"seed {seed}, {row.title}"
    with tqdm(batches, title, unit="step", mininterval=0.5, dynamic_ncols=True) as bar:
        for done, rows in enumerate(bar, 1):
            begin = time.process_time()
            x, y = images[rows], labels[rows]
            if row.rho:
                loss = sam_step(x, y).loss
            else:
                optimizer.zero_grad()
                loss = loss_fn(model, x, y)
                loss.backward()
                optimizer.step()
            scheduler.step()
            seconds += time.process_time() - begin
            if done in marks:
                if not loss.isfinite():
                    raise FloatingPointError(f"{title}: the loss is {loss} after {done} steps")
                accuracy = evaluate(model, data.test_images, data.test_labels)[1]
                curve.append((seconds, accuracy))
                bar.set_postfix_str(f"loss {loss:.3f}, test accuracy {accuracy:.1f}%", refresh=False)
    noise = torch.randn(data.test_images.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    noisy = evaluate(model, data.test_images + NOISE * noise, data.test_labels)[1]
    measured = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    sharpness = rho_sharpness(model.eval(), loss_fn, measured, rho=SHARPNESS_RHO).value
    return Run(name, seed, steps, seconds, accuracy, noisy, sharpness, curve)
