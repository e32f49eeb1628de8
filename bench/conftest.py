"""Options of the suite, the fixture that measures, and the report at the end of a run."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import shapes
from bench.harness import PARTS, Bench
from bench.machine import describe
from bench.records import Memory, Record, Run, geometric_mean
from bench.replay import REPLAY


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sam_fast")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure")
    group.addoption("--full", action="store_true", help="all combinations, not only the default selection (hours)")
    group.addoption("--minutes", type=float, default=math.inf, help="start no further benchmark after so long; the report lists what was left out")
    group.addoption("--smoke", action="store_true", help="tiny shapes and a few rounds: does it run at all?")
    group.addoption("--save", type=Path, help="write the run to this file, for bench.report and bench.compare")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_timer = "bench.replay.REPLAY"
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a GPU and a PyTorch that sees it: torch.cuda.is_available() is False")
    config.stash[BENCH] = Bench(device, config.getoption("--full"), config.getoption("--smoke"))
    if config.getoption("--smoke"):
        shapes.shrink()
    config.stash[MEMORY] = []
    config.stash[BEGIN] = time.monotonic()


ORDER = ["test_optimizer_step", "test_training", "test_overhead", "test_ops", "test_memory", "test_scaling", "test_weak_scaling"]
"""Most important first: what --minutes leaves out is at the end."""

BENCH = pytest.StashKey[Bench]()
MEMORY = pytest.StashKey[list[Memory]]()
BEGIN = pytest.StashKey[float]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        left = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER))
    # The parts of a case far from each other: everything else goes between them.
    others = [item for item in items if _part(item) is None]
    between = len(PARTS) - 1
    items[:] = [item for part in PARTS for item in [*(i for i in items if _part(i) == part), *(others[part::between] if part < between else ())]]


def pytest_collection_finish() -> None:
    # What has been imported stays: looking through it takes longer than many a case.
    gc.collect()
    gc.freeze()


def _part(item: pytest.Item) -> int | None:
    part: int | None = item.callspec.params.get("part") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
    return part


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Bench]:
    """The run's :class:`Bench`; the record that the test makes first is shown in pytest-benchmark's table."""
    collected = request.config.stash[BENCH]
    if time.monotonic() - request.config.stash[BEGIN] > 60 * request.config.getoption("--minutes"):
        collected.left_out.append(f"{request.node.name}: the time was up (--minutes)")
        pytest.skip("the time was up")
    collected.shown = None
    yield collected
    if collected.shown is not None:
        REPLAY.show(benchmark, collected.shown)


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> list[Memory]:
    return request.config.stash[MEMORY]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    bench, memory = config.stash[BENCH], config.stash[MEMORY]
    write = terminalreporter.write_line
    for group, members in groupby(sorted(bench.records, key=lambda r: r.group), key=lambda r: r.group):
        rows = list(members)
        write("")
        write(f"== {group}: median ms; times faster than each baseline (95 % interval)")
        for row in rows:
            write(as_line(row))
        for name in rows[0].baselines:
            ratios = [row.faster_than(name).value for row in rows if name in row.rounds]
            write(f"geometric mean over {len(ratios)}: {geometric_mean(ratios):.2f} times faster than {name}; least: {min(ratios):.2f}")
    for m in memory:
        write(f"memory, {m.case}: {m.contender} {m.bytes_peak / 1e6:.0f} MB")
    for text in bench.left_out:
        write(f"not run: {text}")
    path = config.getoption("--save")
    if path is not None and (bench.records or memory):
        machine = {
            **describe(bench.device),
            "seconds": f"{time.monotonic() - config.stash[BEGIN]:.0f}",
            "selection": "smoke" if bench.smoke else "full" if bench.full else "default",
        }
        Run(machine, bench.records, memory, bench.left_out).save(path)
        write(f"saved: {path}")


def as_line(row: Record) -> str:
    line = f"{row.case:32s} {row.elements / 1e6:8.2f}M {row.seconds().value * 1e3:10.4f} ms"
    for name in row.baselines:
        ratio = row.faster_than(name)
        line += f"  {name} {ratio.value:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"
    share = row.share_of_copy()
    if share is not None:
        line += f"  {(row.bandwidth() or 0) / 1e9:.1f} GB/s = {100 * share.value:.0f} % of a copy's {row.copy_bandwidth() / 1e9:.1f}"
    return line
