"""Options of the suite, the fixture that measures, and the report at the end of a run."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import shapes
from bench.harness import PARTS, Bench
from bench.machine import describe, load_average
from bench.records import Memory, Run
from bench.replay import REPLAY


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sam_fast")
    group.addoption(
        "--device",
        default="cpu",
        choices=["cpu", "cuda", "rehearsal"],
        help="where to measure; rehearsal: as on a GPU, but on the CPU with tiny shapes, to see that it runs",
    )
    group.addoption("--full", action="store_true", help="all combinations, not only the default selection (hours)")
    group.addoption(
        "--minutes",
        type=float,
        default=math.inf,
        help="start no further benchmark after so long; the report lists what was left out",
    )
    group.addoption("--smoke", action="store_true", help="tiny shapes and a few rounds: does it run at all?")
    group.addoption(
        "--save", type=Path, help="write the run to this file after each case, for bench.report and bench.compare"
    )
    group.addoption("--commit", default="", help="of the files, where they came without git")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_timer = "bench.replay.REPLAY"
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "--device cuda needs a GPU and a PyTorch that sees it: torch.cuda.is_available() is False"
        )
    bench = Bench(device, config.getoption("--full"), config.getoption("--smoke"))
    if bench.smoke:
        shapes.shrink()
    selection = (
        "rehearsal" if bench.machine.rehearsal else "smoke" if bench.smoke else "full" if bench.full else "default"
    )
    config.stash[BENCH] = bench
    machine = {**describe(device, config.getoption("--commit")), "seconds": "0", "selection": selection}
    config.stash[RUN] = Run(machine, bench.records, [], bench.left_out)
    config.stash[BEGIN] = time.monotonic()


ORDER = [
    "test_optimizer_step",
    "test_training",
    "test_cheap_sam",
    "test_overhead",
    "test_ops",
    "test_memory",
    "test_scaling",
    "test_weak_scaling",
]
"""Most important first: what --minutes leaves out is at the end."""

BENCH = pytest.StashKey[Bench]()
RUN = pytest.StashKey[Run]()
BEGIN = pytest.StashKey[float]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    bench = config.stash[BENCH]
    left = [item for item in items if _left_out(item, bench)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER))
    if bench.machine.gpu:
        # What launching takes comes first: the profiler, which the others use, may leave every launch a little slower.
        items.sort(
            key=lambda item: (
                not any(name in item.nodeid for name in ("test_overhead", "test_training", "with_launches"))
            )
        )
        return
    # The parts of a case far from each other: everything else goes between them.
    others = [item for item in items if _part(item) is None]
    between = len(PARTS) - 1
    items[:] = [
        item
        for part in PARTS
        for item in [*(i for i in items if _part(i) == part), *(others[part::between] if part < between else ())]
    ]


def pytest_collection_finish() -> None:
    # What has been imported stays: looking through it takes longer than many a case.
    gc.collect()
    gc.freeze()


def _left_out(item: pytest.Item, bench: Bench) -> bool:
    full = item.get_closest_marker("full")
    if full is not None and not bench.full and bench.machine.kind in (full.args or ("cpu", "cuda")):
        return True
    if item.get_closest_marker("gpu") and not bench.machine.gpu:
        return True
    return _part(item) not in (None, *bench.parts)


def _part(item: pytest.Item) -> int | None:
    part: int | None = (
        item.callspec.params.get("part") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
    )
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
    save(request.config)
    if collected.shown is not None:
        REPLAY.show(benchmark, collected.shown)


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> list[Memory]:
    return request.config.stash[RUN].memory


def save(config: pytest.Config) -> None:
    """Write what there is so far: a run that is killed keeps it."""
    run, path = config.stash[RUN], config.getoption("--save")
    if path is not None and (run.records or run.memory):
        run.machine |= {"load average": load_average(), "seconds": f"{time.monotonic() - config.stash[BEGIN]:.0f}"}
        run.save(path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    # not before the tests: it imports some of them, whose assertions pytest rewrites
    from bench.report import comparison

    run = config.stash[RUN]
    write = terminalreporter.write_line
    for group in dict.fromkeys(r.group for r in run.records):
        for line in comparison(run, group):
            write(line)
    for m in run.memory:
        write(f"memory, {m.case}: {m.contender} {m.bytes_peak / 1e6:.0f} MB")
    for text in run.left_out:
        write(f"not run: {text}")
    save(config)
