"""What does not depend on the number of elements: host time of first_step, of the BatchNorm snapshot, of the import."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from bench.harness import ROWS, Contender, Row, make_params, measure
from sam_fast import SAM, BatchNormSnapshot


@pytest.mark.parametrize("flatten", [False, True], ids=["default", "flatten"])
@pytest.mark.parametrize("tensors", [1, 161, 10_000])
def test_first_step_host_overhead(benchmark: Any, tensors: int, flatten: bool) -> None:
    """first_step on parameters of 8 elements: the time is all overhead. Target: 60 us for 161 parameters."""
    params = make_params([[8]] * tensors)
    optimizer = SAM(params, lr=0.1, flatten=flatten)
    optimizer.first_step()
    optimizer.restore()
    benchmark.group = f"host overhead, {tensors} tensors of 8 elements"
    benchmark.pedantic(optimizer.first_step, teardown=optimizer.restore, rounds=2000 if tensors < 1000 else 100, warmup_rounds=20)
    case = f"{tensors} x 8{', flatten' if flatten else ''}"
    ROWS.append(Row("host overhead of first_step", case, 8 * tensors, seconds=benchmark.stats.stats.median))


@pytest.mark.parametrize("layers", [1, 53, 500])
def test_batchnorm_snapshot(benchmark: Any, layers: int) -> None:
    """save + restore of all running statistics; a loop over the layers is the baseline."""
    model = nn.Sequential(*(nn.BatchNorm1d(64) for _ in range(layers)))
    snapshot = BatchNormSnapshot(model)

    def run() -> None:
        snapshot.save()
        snapshot.restore()

    before = [b.clone() for b in model.buffers()]
    snapshot.save()
    for b in model.buffers():
        b.fill_(3)
    snapshot.restore()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))

    def loop() -> None:
        saved = [b.clone() for b in model.buffers()]
        for b, old in zip(model.buffers(), saved, strict=True):
            b.copy_(old)

    benchmark.group = f"BatchNorm snapshot, {layers} layers"
    row = Row("BatchNorm snapshot, save + restore", f"{layers} layers", 129 * layers)
    measure(benchmark, row, Contender(run), {"loop over buffers": Contender(loop)}, rounds=200)


def test_import_time(benchmark: Any) -> None:
    """Seconds that ``import sam_fast`` adds to ``import torch``, in a fresh process. Target: 0.05 s."""
    script = "import time, torch; t = time.perf_counter(); import sam_fast; print(time.perf_counter() - t)"

    def run() -> float:
        return float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)

    run()
    samples = [run() for _ in range(4)]
    benchmark.group = "import"
    samples.append(benchmark.pedantic(run, rounds=1))
    ROWS.append(Row("import sam_fast after import torch", "fresh process", 0, seconds=statistics.median(samples)))
