"""Sharpness as SAM sees it: how far the loss rises to the point that one ascent step reaches on a ball around w."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import slice_rows
from ..options import check_above_zero, check_at_least_zero, check_count, check_flag
from .measurement import Measurement, finite, not_empty


@dataclass(frozen=True)
class Sharpness:
    """What :func:`rho_sharpness` returns.

    Attributes:
        value: mean of L(w + e) - L(w) over the batches, each counted by its rows.
        standard_error: of ``value``, from how the batches differ; NaN for a single batch.
        loss: mean of L(w).
        batches: how many there were, in all processes.
    """

    value: float
    standard_error: float
    loss: float
    batches: int


def rho_sharpness(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    *,
    rho: float,
    m: int | None = None,
    adaptive: bool = False,
    eta: float = 0.0,
    backend: str | None = None,
    progress: bool = False,
) -> Sharpness:
    """rho-sharpness: L(w + e) - L(w) with the e that SAM would choose for each batch; with ``m``, m-sharpness (Foret et
    al., https://arxiv.org/abs/2010.01412); with ``adaptive``, that of ASAM (https://arxiv.org/abs/2102.11600).

    ``e = rho T^2 g / ||T g||`` with the batch's own gradient g: one ascent step, so a lower bound of the maximum over
    the ball. Both passes draw the same dropout masks. Costs two forward passes and a backward pass over the batches.

    Call it between steps, not between a forward pass and its backward. The model is measured in the mode it is in:
    in training mode what SAM minimizes, after ``model.eval()`` what is deployed. In 16-bit weights e may drown in
    rounding: measure in float32.

    With DistributedDataParallel each process passes batches of its own, however many, and is perturbed along its own
    gradients. With FSDP2 all pass equally many, and the first ones, the second ones, ... of all processes are one batch
    with one perturbation. All return the same numbers.

    Args:
        model: the model, in DistributedDataParallel or FSDP2 or not. Parameters that require no gradient do not move.
        loss_fn: ``loss_fn(model, *batch)`` returns a scalar, a mean over the batch's rows. It is called with the module
            inside DistributedDataParallel, and has to enter autocast itself if that is wanted.
        batches: such as a DataLoader; gone through once. A batch that is not a tuple or list is one argument.
        rho: radius of the ball, above 0.
        m: samples per perturbation: each batch is split into shards of m rows, of which the last may have fewer. None:
            the whole batch.
        adaptive: as in :class:`sam_fast.SAM`.
        eta: likewise.
        backend: likewise.
        progress: show a progress bar (needs tqdm).

    Raises:
        TypeError: an argument is of the wrong type, or ``loss_fn`` returns no tensor.
        ValueError: an argument is out of range; there are no batches; the loss is no scalar, not finite at w or w + e,
            or its gradient is not; the model has no trainable parameters; ``m`` with FSDP2.
    """
    check_above_zero("rho", rho)
    check_at_least_zero("eta", eta)
    check_flag("adaptive", adaptive)
    if m is not None:
        check_count("m", m)
    measured = Measurement(model, loss_fn, batches, backend=backend)
    if m is not None and measured.mesh is not None:
        raise ValueError(
            f"m={m} needs gradients of one process, and model's parameters are spread over several: leave m out, and "
            "pass each process batches of m rows divided by the number of processes"
        )
    found: list[list[float]] = []
    with measured.leaving_no_trace(), measured.progress(progress, "sharpness", measured.count) as tick:
        for batch, rows in measured.each_batch():
            size = rows if m is None else m
            if size > rows and not found:
                raise ValueError(f"m={m} is more than the {rows} rows of the first batch")
            low = high = 0.0
            for begin in range(0, rows, size):
                part = batch if size >= rows else slice_rows(batch, begin, min(begin + size, rows))
                at_w, at_worst = _ascend(measured, part, rho, adaptive, eta)
                share = min(size, rows - begin) / rows
                low, high = low + share * at_w, high + share * at_worst
            found.append([float(rows), low, high - low])
            tick()
    return _summary(measured, found)


def _ascend(measured: Measurement, batch: Any, rho: float, adaptive: bool, eta: float) -> tuple[float, float]:
    """The losses at w and at w + e."""
    before = measured.random_state()
    loss = measured.loss(batch)
    direction = measured.gradients(loss)
    with measured.moved(direction, rho, adaptive, eta), before.replayed():
        return float(loss.detach()), finite(measured.loss(batch), "w + e")


def _summary(measured: Measurement, found: list[list[float]]) -> Sharpness:
    table = torch.tensor(found, dtype=torch.float64, device="cpu").reshape(-1, 3)
    if measured.mesh is not None and found:  # each row is the mean over what the processes had of one batch
        table = measured.add_over_mesh(torch.cat([table[:, :1], table[:, :1] * table[:, 1:]], dim=1))
        table[:, 1:] /= table[:, :1]
    rows, losses, rises = table.unbind(1)
    sums = measured.numbers([len(found), float(rows.sum()), float(rows @ losses), float(rows @ rises)])
    measured.add_over_replicas(sums)
    count, total, loss, rise = sums.tolist()
    not_empty(count)
    mean = rise / total
    spread = measured.numbers([float((rows * (rises - mean)).square().sum())])
    measured.add_over_replicas(spread)
    error = math.sqrt(float(spread) * count / (count - 1)) / total if count > 1 else math.nan
    return Sharpness(mean, error, loss / total, int(count))
