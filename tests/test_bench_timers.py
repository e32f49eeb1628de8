"""The benchmarks' timers: rounds, head starts, and what a GPU is asked for."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import harness
from bench.harness import (
    HEAD_START,
    HOST,
    KERNELS,
    LAUNCHES,
    WARMUP,
    WORK,
    Bench,
    Case,
    Contender,
    Timer,
    measure,
    nothing,
)

ROOT = Path(__file__).parent.parent


def test_a_round_times_every_stage_of_every_contender_once():
    calls: list[str] = []
    stages = {"one": lambda: calls.append("a1"), "two": lambda: calls.append("a2")}
    contenders = {
        "a": Contender(stages, lambda: calls.append("before"), lambda: calls.append("after")),
        "b": Contender({"": lambda: calls.append("b")}),
    }
    timers = measure(contenders, 0.0, (4, 4))
    assert {stage: {name: len(t.rounds) for name, t in by_name.items()} for stage, by_name in timers.items()} == {
        "one": {"a": 4},
        "two": {"a": 4},
        "": {"b": 4},
    }
    text = " ".join(calls)
    assert text.count("before a1 after before a2 after") == text.count("before a1") == text.count("after") / 2
    assert calls.count("a1") == calls.count("a2") == calls.count("b") == 4 + WARMUP


def test_a_contender_that_leads_in_runs_untimed_before_each_round():
    calls: list[str] = []
    contenders = {name: Contender({"": lambda name=name: calls.append(name)}) for name in "ab"}
    timers = measure(contenders, 0.0, (4, 4), lead_in=1)
    assert [len(timer.rounds) for timer in timers[""].values()] == [4, 4]
    assert len(calls) == 2 * 2 * (4 + WARMUP)
    assert calls[::2] == calls[1::2]


def test_the_order_is_drawn_anew_for_each_round():
    calls: list[str] = []
    contenders = {name: Contender({"": lambda name=name: calls.append(name)}) for name in "abcd"}
    measure(contenders, 0.0, (20, 20))
    rounds = [tuple(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert {tuple(sorted(names)) for names in rounds} == {tuple("abcd")}
    assert len(set(rounds)) > 10


def test_rounds_fill_the_time_between_the_least_and_the_most():
    def counted(seconds: float, rounds: tuple[int, int]) -> int:
        timers = measure({"a": Contender({"": lambda: time.sleep(1e-3)})}, seconds, rounds)
        return len(timers[""]["a"].rounds)

    assert counted(0.0, (2, 9)) == 2
    assert counted(60.0, (2, 9)) == 9
    assert 2 < counted(0.05, (2, 1000)) <= 50


PAGE_FAULTS = """
import resource, statistics, torch
from bench.harness import WARMUP, Contender, measure

source, counts = torch.rand(1 << 24), []

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def run():
    before = faults()
    temporaries = [source * 2 for _ in range(2)]
    counts.append(faults() - before)

measure({"a": Contender({"": run})}, 0.0, (15, 15))
print(int(statistics.median(counts[WARMUP:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its allocator's settings")
def test_after_the_warm_up_hardly_a_round_pays_for_page_faults():
    """In a process of its own, whose allocator is told so. By default these temporaries cost 32,768 pages a round."""
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0


@pytest.fixture
def gpu(request, monkeypatch) -> None:
    """Its events say 7 s, and its profiler finds two kernels. With ``late`` it is awake before everything is
    launched."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", nothing)
    monkeypatch.setattr(harness, "by_events", lambda run, head_start: (7.0, request.param != ""))
    monkeypatch.setattr(harness, "by_kernels", lambda run: [] if request.param == "late, no profiler" else [0.5, 0.25])


@pytest.mark.parametrize("head_start", [0.0, HEAD_START])
def test_the_device_is_idle_or_asleep_when_the_time_begins(head_start, monkeypatch):
    calls: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(cycles / 2e9))
    assert harness.by_events(lambda: calls.append("run"), head_start) == (7e-3, True)
    asleep = [head_start] if head_start else []
    assert calls == ["synchronize", *asleep, "record", "run", "record", "wait"]


@pytest.mark.parametrize("gpu", ["late"], indirect=True)
def test_without_a_head_start_events_count_in_every_round(gpu):
    timer = Timer(LAUNCHES, gpu=True)
    for _ in range(3):
        timer(nothing)
    assert (timer.rounds, timer.launches, timer.method) == ([7.0] * 3, 0, LAUNCHES)


@pytest.mark.parametrize(
    ("gpu", "rounds", "method"),
    [
        ("", [0.75, 7.0, 7.0, 7.0], WORK),  # the first counts launches
        ("late", [0.75, 7.0, 0.75, 0.75], KERNELS),
        ("late, no profiler", [0.0, 7.0, 7.0, 7.0], LAUNCHES),
    ],
    indirect=["gpu"],
)
def test_where_the_head_start_is_too_short_the_kernels_are_added_up(gpu, rounds, method):
    timer = Timer(WORK, gpu=True)
    for _ in range(4):
        timer(nothing)
    assert (timer.rounds, timer.method) == (rounds, method)
    assert timer.launches == (0 if method == LAUNCHES else 2)


@pytest.mark.parametrize("gpu", ["late"], indirect=True)
def test_the_host_alone_is_timed_by_its_clock(gpu):
    timer = Timer(HOST, gpu=True)
    timer(nothing)
    assert 0 < timer.rounds[0] < 1
    assert timer.method == HOST


def test_how_each_was_timed_is_in_the_record():
    ours, reference = Contender({"first_step": nothing}), Contender({"first_step": nothing}, method=LAUNCHES)
    record = Bench("rehearsal").run(Case(nothing, "g", "c"), {"sam_fast": ours, "reference": reference}, 221)[0]
    assert record.facts["timed by"] == {"sam_fast": WORK, "reference": LAUNCHES}
    assert Bench(smoke=True).run(Case(nothing, "g", "c"), {"sam_fast": ours}, 1)[0].facts == {}


def test_the_profiler_s_kernels_are_counted():
    x = torch.ones(1000)

    def run() -> None:
        with torch.profiler.record_function("an annotation, which is no kernel"):
            for _ in range(5):
                x.neg_()

    durations = harness.by_kernels(run, kind="CPU")
    assert len(durations) == 5
    assert 0 < sum(durations) < 10
