"""Options of the suite, the fixture that measures, and the figures at the end of a run."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import models
from bench.harness import Bench
from bench.machine import describe, load_average
from bench.records import Run

BENCH, RUN, BEGIN = pytest.StashKey[Bench](), pytest.StashKey[Run](), pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    add, devices = parser.getgroup("sam_fast").addoption, ["cpu", "cuda", "rehearsal"]
    rehearsal = "rehearsal: as on a GPU, but on the CPU with tiny shapes, to see that it runs"
    add("--device", default="cpu", choices=devices, help=f"where to measure; {rehearsal}")
    add("--full", action="store_true", help="all combinations, not only the default selection (hours)")
    add("--minutes", type=float, default=math.inf, help="start no further benchmark after so long")
    add("--smoke", action="store_true", help="tiny shapes and a few rounds: does it run at all?")
    add("--save", type=Path, help="write the run to this file after each case, for bench.report and bench.compare")
    add("--commit", default="", help="of the files, where they came without git")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_timer = "bench.conftest.REPLAY"
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a GPU and a PyTorch that sees it, which is not the case here")
    bench = Bench(device, config.getoption("--full"), config.getoption("--smoke"))
    if bench.smoke:
        models.shrink()
    rehearsal = "rehearsal" if bench.machine.rehearsal else ""
    selection = rehearsal or ("smoke" if bench.smoke else "full" if bench.full else "default")
    machine = {**describe(device, config.getoption("--commit")), "seconds": "0", "selection": selection}
    config.stash[BENCH], config.stash[RUN] = bench, Run(machine, bench.records, bench.left_out)
    config.stash[BEGIN] = time.monotonic()


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "part" in metafunc.fixturenames:
        once = metafunc.definition.get_closest_marker("once") is not None
        metafunc.parametrize("part", range(1 if once else metafunc.config.stash[BENCH].parts))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    bench = config.stash[BENCH]
    full, kind = config.getoption("--full"), bench.machine.kind
    left = []
    for item in items:
        mark = item.get_closest_marker("full")
        unwanted = mark is not None and not full and kind in (mark.args or ("cpu", "cuda"))
        if unwanted or (item.get_closest_marker("gpu") is not None and not bench.machine.gpu):
            left.append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
    # The parts of a case far from each other. On a GPU what launching takes comes first: the profiler, which the others
    # use, may leave every launch a little slower.
    launching = ("host_overhead", "training", "with_launches") if bench.machine.gpu else ()
    items.sort(key=lambda item: (item.callspec.params["part"], not any(name in item.nodeid for name in launching)))


def pytest_collection_finish() -> None:
    # What has been imported stays: looking through it takes longer than many a case.
    gc.collect()
    gc.freeze()


class Replay:
    """pytest-benchmark's timer: it advances only by what the harness has measured, whose contenders take turns, so that
    its table shows the same numbers for every device."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-12  # a timer that stood still would have no precision to determine
        return self.now


REPLAY = Replay()


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any, part: int) -> Iterator[Bench]:
    """The run's :class:`Bench`. What the test measures first is shown in pytest-benchmark's table, all parts so far."""
    bench, config = request.config.stash[BENCH], request.config
    parameters = {name: value for name, value in request.node.callspec.params.items() if name != "part"}
    bench.case, bench.shown = f"{request.node.originalname}{list(parameters.values())}", None
    if time.monotonic() - config.stash[BEGIN] > 60 * config.getoption("--minutes"):
        if part == 0:
            bench.leave_out(f"{bench.case}: the time was up (--minutes)")
        pytest.skip("the time was up")
    yield bench
    save(config)
    if (record := bench.shown) is not None:
        rounds = iter(record.rounds[record.target])

        def one() -> None:
            REPLAY.now += next(rounds)

        benchmark.group = record.key
        benchmark.extra_info.update(record.facts)
        benchmark.pedantic(one, rounds=len(record.rounds[record.target]))


def save(config: pytest.Config) -> None:
    """Write what there is so far: a run that is killed keeps it."""
    run, path = config.stash[RUN], config.getoption("--save")
    if path is not None and run.records:
        run.machine |= {"load average": load_average(), "seconds": f"{time.monotonic() - config.stash[BEGIN]:.0f}"}
        run.save(path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[RUN]
    for record in run.records:
        medians = {name: statistics.median(rounds) for name, rounds in record.rounds.items()}
        figures = ", ".join(f"{name} {seconds:.4g}" for name, seconds in medians.items())
        terminalreporter.write_line(f"{record.key}: {figures} {record.facts.get('unit', 's')}")
    for text in run.left_out:
        terminalreporter.write_line(f"not run: {text}")
