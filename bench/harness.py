"""How a benchmark is measured: interleaved with its baselines in one process, medians, next to a bandwidth measured in the same run."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam_fast import backends
from sam_fast.bucket import Bucket

SHAPES: dict[str, list[list[int]]] = json.loads((Path(__file__).parent / "model_shapes.json").read_text())
"""Parameter shapes of real models, by model name."""

COPY = "streaming copy"
COPY_ELEMENTS = 16_000_000
"""Twice 64 MB: more than the caches of the machines this runs on."""

BYTES_PER_ELEMENT = {"grad_norm": 4, "perturb": 16, "restore": 8, "first_step": 20}
"""Bytes that must move per float32 element: norm reads g; perturb reads w and g, writes w and the backup; restore copies."""


@dataclass
class Row:
    """One line of the report."""

    group: str
    case: str
    elements: int
    bytes_per_element: int | None = None
    seconds: float = math.nan
    baselines: dict[str, float] = field(default_factory=dict)
    copy_bandwidth: float = math.nan

    def ratio(self, baseline: str) -> float:
        return self.baselines[baseline] / self.seconds

    def bandwidth(self) -> float | None:
        """Bytes per second, of the bytes that must move."""
        return None if self.bytes_per_element is None else self.bytes_per_element * self.elements / self.seconds


ROWS: list[Row] = []
"""What this run measured; conftest.py prints it at the end."""


def make_params(shapes: list[list[int]], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters like a network's: weights of sd 0.02, gradients of sd 0.001 (never zeros: those are faster)."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        p = nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
        p.grad = (torch.randn(shape, generator=generator) * 0.001).to(dtype)
        params.append(p)
    return params


def copies(params: list[nn.Parameter], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    out = []
    for p in params:
        q = nn.Parameter(p.detach().clone().to(dtype or p.dtype))
        q.grad = _gradient(p).clone().to(dtype or p.dtype)
        out.append(q)
    return out


def nothing() -> None:
    pass


@dataclass
class Contender:
    """What is timed (``run``), and what goes before and after it untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing
    finish: Callable[[], object] = nothing


def measure(benchmark: Any, row: Row, target: Contender, baselines: dict[str, Contender], *, rounds: int) -> None:
    """Time ``target`` with pytest-benchmark, and the baselines and a streaming copy in between, one round of each in turn.

    The medians complete ``row``, which joins the report. The copy runs in turn with the rest because the bandwidth of a shared machine was seen
    to change by half within minutes.
    """
    others = {COPY: streaming_copy(), **baselines}
    times: dict[str, list[float]] = {name: [] for name in others}

    def before_target() -> None:
        for name, baseline in others.items():
            baseline.prepare()
            begin = time.perf_counter()
            baseline.run()
            times[name].append(time.perf_counter() - begin)
            baseline.finish()
        target.prepare()

    warmup = 2
    benchmark.pedantic(target.run, setup=before_target, teardown=target.finish, rounds=rounds, warmup_rounds=warmup)
    medians = {name: statistics.median(values[warmup:]) for name, values in times.items()}
    row.seconds = benchmark.stats.stats.median
    row.copy_bandwidth = 2 * 4 * COPY_ELEMENTS / medians.pop(COPY)
    row.baselines = medians
    ROWS.append(row)


class Backward:
    """Hands out gradients as a backward pass does: in new memory, last parameter first. ``zero_grad`` frees them."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.gradients = [_gradient(p).clone() for p in params]

    def __call__(self) -> None:
        for p, gradient in zip(reversed(self.params), reversed(self.gradients), strict=True):
            if p.grad is None:
                p.grad = gradient.clone()
            else:
                p.grad.copy_(gradient)  # flatten=True: gradients stay where they are


def rounds_for(elements: int) -> int:
    """More rounds for what is quick."""
    return max(9, min(60, int(6e8 / max(elements, 1))))


@cache
def streaming_copy() -> Contender:
    """A plain copy of 64 MB with streaming stores (the backup kernel on one tensor): what the memory gives at this moment."""
    source = torch.rand(COPY_ELEMENTS)
    backend = backends.choose(source)
    bucket = Bucket([source], [0], backend)
    return Contender(lambda: backend.save(bucket))


def check_first_step(moved: list[nn.Parameter], start: list[nn.Parameter], rho: float, adaptive: bool = False) -> None:
    """Refuse to time a wrong result: ``moved`` must be where the formula in float64 goes from ``start``.

    One parameter at a time: a float64 copy of the whole model just before the timing would leave the allocator in a state that no training
    process is in (all temporaries served without a page fault).
    """

    def t(p: Tensor) -> Tensor | float:
        return p.detach().double().abs() if adaptive else 1.0

    norm = math.sqrt(sum(float((t(p) * _gradient(p).double()).square().sum()) for p in start))
    for p, q in zip(moved, start, strict=True):
        want = q.detach().double() + t(q) ** 2 * _gradient(q).double() * (rho / (norm + 1e-12))
        # w + e is rounded to float32: half a unit in the last place of |w| < 0.2.
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-6, atol=1e-8)


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
