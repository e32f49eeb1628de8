"""Training with SAM as a plain loop that uses nothing of sam_fast: what frameworks' runs are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from plain_sam import PlainSAM
from torch import Tensor, nn


@dataclass
class Record:
    """What a step has measured: mean losses at w and at w + e, and the first gradient's norm."""

    losses: list[float] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def plain_step(
    model: nn.Module,
    sam: PlainSAM,
    window: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    divide: float,
    clip: float | None = None,
    record: Record | None = None,
    first: Callable[[Any], Any] = lambda batch: batch,
) -> None:
    """Both passes over the same batches, whose losses are each divided by ``divide``; running statistics count once."""

    def run(part: Callable[[Any], Any]) -> float:
        total = 0.0
        for batch in window:
            loss = loss_fn(model, part(batch)) / divide
            loss.backward()
            total += float(loss.detach())
        return total

    sam.zero_grad()
    at_w = run(first)
    sam.first_step()
    buffers = [b.clone() for b in model.buffers()]
    at_w_plus_e = run(lambda batch: batch)
    for buffer, old in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(old)
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    sam.second_step()
    if record is not None:
        record.losses.append(at_w)
        record.sharpness.append(at_w_plus_e - at_w)
        record.norms.append(sam.norm)


def windows(batches: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """The batches of each step; the last window of an epoch may be shorter."""
    return (batches[i : i + size] for i in range(0, len(batches), size))


def small_net(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Sequential:
    """BatchNorm included; the same weights each time."""
    torch.manual_seed(1)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def data(rows: int = 28, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (rows,), generator=generator)


def batches(rows: int = 28, size: int = 4, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """The same in batches, as a DataLoader without shuffling gives them."""
    x, y = data(rows, dtype)
    return list(zip(x.split(size), y.split(size), strict=True))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Mean loss of a batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and statistics."""
    return copy.deepcopy(model.state_dict())


def furthest(a: Any, b: Any) -> float:
    """The largest difference between two models' weights and statistics."""
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)
