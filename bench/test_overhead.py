"""What does not depend on the number of elements: host time of the two steps, and of the import."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest
from torch import Tensor

from bench import peers
from bench.clock import HOST_ALONE
from bench.harness import PARTS, Bench, Method, Plan, Problem, make_params
from bench.records import Record
from bench.test_optimizer_step import BASES


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("flatten", [False, True], ids=["default", "flatten"])
@pytest.mark.parametrize("tensors", [1, 161, pytest.param(10_000, marks=pytest.mark.full)])
def test_host_overhead(bench: Bench, tensors: int, flatten: bool, part: int) -> None:
    """The two steps on parameters of 8 elements: the time is all overhead.

    Target: 60 us for first_step with 161 parameters, alone.
    """
    base, options, _ = BASES["SGD"]

    def make(check: bool) -> tuple[dict[str, Method], list[Tensor]]:
        problem = Problem(make_params([[8]] * tensors, device=bench.device), base, options, checks=check)
        target = peers.sam_fast(problem, flatten=flatten)
        problem.check("sam_fast", target)
        return {"sam_fast": target, **peers.make((peers.REFERENCE, peers.FOREACH), problem)[0]}, problem.gradients()

    methods, gradients = bench.kept(("host time", tensors, flatten), part, make)
    case = f"{tensors} x 8{', flatten' if flatten else ''}"
    contenders = {name: method.contender(gradients, head_start=HOST_ALONE) for name, method in methods.items()}
    bench.run("host time", case, contenders, elements=8 * tensors, plan=Plan(seconds=0.4, rounds=(5, 60)))
    # The same where nothing else has used the caches in between.
    alone = {"sam_fast": contenders["sam_fast"]}
    bench.run("host time, alone", case, alone, elements=8 * tensors, plan=Plan(seconds=0.1, rounds=(15, 100)))


def test_import_time(bench: Bench) -> None:
    """Seconds that ``import sam_fast`` adds to ``import torch``, in fresh processes. Target: 0.05 s."""
    script = "import time, torch; t = time.perf_counter(); import sam_fast; print(time.perf_counter() - t)"

    def run() -> float:
        return float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)

    run()
    samples = [run() for _ in range(3)]
    assert statistics.median(samples) > 0
    bench.shown = bench.add(
        Record("import sam_fast after import torch", "fresh process", "sam_fast", {"sam_fast": samples})
    )
