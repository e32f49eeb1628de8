"""Options of the suite, the fixture that measures, and the figures at the end of a run."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import CASES
from bench.contenders import shrink
from bench.harness import Bench, Case, nothing
from bench.optimizer import usable
from bench.records import Run, describe

BENCH, RUN = pytest.StashKey[Bench](), pytest.StashKey[Run]()
BEGIN = time.monotonic()
TIMES: list[float] = []


def replay() -> float:
    """pytest-benchmark's timer, which it reads before and after each round: it says what the harness has measured."""
    return TIMES.pop()


def pytest_addoption(parser: pytest.Parser) -> None:
    add, devices = parser.getgroup("sam_fast").addoption, ["cpu", "cuda", "rehearsal"]
    rehearsal = "rehearsal: as on a GPU, but on the CPU with tiny shapes, to see that it runs"
    add("--device", default="cpu", choices=devices, help=f"where to measure; {rehearsal}")
    add("--minutes", type=float, default=math.inf, help="start no further benchmark after so long")
    add("--smoke", action="store_true", help="tiny shapes and a few rounds: does it run at all?")
    add("--save", type=Path, help="write the run to this file after each case, for bench.report and bench.compare")
    add("--commit", default="", help="of the files, where they came without git")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_timer = "bench.conftest.replay"
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a GPU and a PyTorch that sees it, which is not the case here")
    bench = Bench(device, config.getoption("--smoke"))
    if bench.smoke:
        shrink()
    machine = {**describe(device, config.getoption("--commit")), "backend": usable(bench.device)[0]}
    machine["selection"] = "smoke" if bench.smoke else "default"
    config.stash[BENCH], config.stash[RUN] = bench, Run(machine, bench.records, bench.left_out)
    gc.freeze()  # what has been imported stays: looking through it takes longer than many a case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    bench = metafunc.config.stash[BENCH]
    cases = [case for case in CASES if ("cuda" if bench.gpu else "cpu") in case.on]
    parts = [(case, n) for n in range(bench.parts) for case in cases if n < case.parts]
    metafunc.parametrize(("case", "part"), parts, ids=[f"{case.id}-{n}" for case, n in parts])


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any, case: Case, part: int) -> Iterator[Bench]:
    """The run's :class:`Bench`. What the case measures first is shown in pytest-benchmark's table, all parts so far.
    The run is saved after each case: one that is killed keeps what it had."""
    option, bench, run = request.config.getoption, request.config.stash[BENCH], request.config.stash[RUN]
    bench.shown = None
    if time.monotonic() - BEGIN > 60 * option("--minutes"):
        if part == 0:
            bench.leave_out(f"{case.id}: the time was up (--minutes)")
        pytest.skip("the time was up")
    yield bench
    run.machine |= {"load average": f"{os.getloadavg()[0]:.1f}", "seconds": f"{time.monotonic() - BEGIN:.0f}"}
    if option("--save") and run.records:
        run.save(option("--save"))
    if bench.shown is not None:
        rounds = bench.shown.rounds[bench.shown.target]
        TIMES[:] = [time for seconds in reversed(rounds) for time in (seconds, 0.0)]
        benchmark.group = bench.shown.key
        benchmark.pedantic(nothing, rounds=len(rounds))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[RUN]
    for record in run.records:
        figures = [f"{name} {statistics.median(rounds):.4g}" for name, rounds in record.rounds.items()]
        terminalreporter.write_line(f"{record.key}: {', '.join(figures)} {record.facts.get('unit', 's')}")
    for text in run.left_out:
        terminalreporter.write_line(f"not run: {text}")
