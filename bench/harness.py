"""How a case is measured: its contenders take turns in one process, next to the memory's bandwidth; on the CPU by the
host's clock, on a GPU by events or by the durations of its kernels. README.md has the reasons.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.records import COPY, TORCH_COPY, Record
from sam_fast import backends

Work = Callable[[], object]
WARMUP = 3  # rounds; on a GPU the first counts launches, the next decide between events and kernels
PARTS = 3  # of a case on a CPU
HEAD_START, LONG_HEAD_START = 3e-3, 20e-3  # seconds; enough to launch our step, or several kernels for each parameter
WORK, LAUNCHES, HOST = "events, after a head start", "events, with launches", "host clock"
"""How a contender is timed on a GPU: its work alone; from an idle device on; only until the call returns."""
KERNELS = "sum of the kernels' durations"  # where the head start is too short
ROOM = 8  # times the parameters' memory is made ready for temporaries and gradients, which lie between others'
CACHES = 10  # times the cache's size must move, for the rate to be the memory's
CEILING = 1.1  # a GPU's memory is not faster than that, relative to the copy
READ_ONLY = "grad_norm"  # groups that begin so only read, which some memories do faster than they copy


def nothing() -> None:
    pass


def synchronize() -> None:
    """Wait for the GPU where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def by_host(run: Work) -> float:
    """Seconds by the host's clock. A GPU is waited for before and after, untimed."""
    synchronize()
    begin = time.perf_counter()
    run()
    taken = time.perf_counter() - begin
    synchronize()
    return taken


def by_events(run: Work, head_start: float) -> tuple[float, bool]:
    """Seconds by a GPU's events, and whether it was awake before the host had launched everything."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # What was queued before must not run while the host launches: without a head start the work would get one.
    torch.cuda.synchronize()
    if head_start:
        torch.cuda._sleep(int(head_start * 2e9))  # cycles per second, about
    begin.record()
    run()
    late = begin.query()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, late


def by_kernels(run: Work, kind: str = "CUDA") -> list[float]:
    """Seconds of each kernel, copy and memset that ``run`` launches; empty where the profiler may not look."""
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profile:
        run()
        synchronize()
    # Not profile.events(), which takes seconds for thousands of launches.
    events, device = profile.profiler.kineto_results.events(), getattr(torch.autograd.DeviceType, kind)
    return [e.duration_ns() / 1e9 for e in events if e.device_type() == device and not e.is_user_annotation()]


class Timer:
    """Times one stage of one contender, round by round: in seconds, ``rounds``."""

    def __init__(self, method: str, gpu: bool, head_start: float = LONG_HEAD_START) -> None:
        self.method, self.head_start = method if gpu else HOST, head_start
        self.rounds: list[float] = []
        self.launches = 0

    def __call__(self, run: Work) -> None:
        rehearsal = not torch.cuda.is_initialized()  # whose times are the host's and say nothing
        if self.method == HOST:
            seconds = by_host(run)
        elif self.method == KERNELS or (self.method == WORK and not self.rounds):
            durations = [by_host(run)] if rehearsal else by_kernels(run)
            self.launches, seconds = len(durations), sum(durations)
        else:
            head_start = self.head_start if self.method == WORK else 0.0
            seconds, late = (by_host(run), False) if rehearsal else by_events(run, head_start)
            if late and self.method == WORK and len(self.rounds) < WARMUP:
                self.method = KERNELS if self.launches else LAUNCHES
        self.rounds.append(seconds)


@dataclass(frozen=True)
class Case:
    """A row of cases.py, whose records ``measure(bench, case, **options)`` makes."""

    measure: Callable[..., None]
    group: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    on: tuple[str, ...] = ("cpu", "cuda")
    parts: int = PARTS
    seconds: float = 1.0
    """That a part takes on a CPU, with at least and at most so many ``rounds``; on a GPU all cases take the same."""
    rounds: tuple[int, int] = (5, 60)
    lead_in: int = 0  # untimed runs before each round, so that a contender finds the caches as it leaves them itself

    @property
    def id(self) -> str:
        """For pytest's -k: words and numbers without spaces."""
        return "-".join(re.sub(r"[^\w.]+", "_", text) for text in (self.measure.__name__, self.group, self.name))


@dataclass
class Contender:
    """What is timed: stages one after the other, each by itself. ``prepare`` runs before and ``finish`` after each,
    untimed. ``method``: how a GPU is timed. ``head_start``: in seconds, where it has one."""

    stages: dict[str, Work]
    prepare: Work = nothing
    finish: Work = nothing
    method: str = WORK
    head_start: float = LONG_HEAD_START


def measure(
    contenders: dict[str, Contender],
    seconds: float,
    rounds: tuple[int, int],
    gpu: bool = False,
    flush: Work = nothing,
    lead_in: int = 0,
) -> dict[str, dict[str, Timer]]:
    """Timers by stage and contender. There are as many rounds as ``seconds`` allow, but at least and at most
    ``rounds``. Each draws the contenders' order anew: none always finds the caches as the same other left them."""
    timers: dict[str, dict[str, Timer]] = defaultdict(dict)
    for name, contender in contenders.items():
        for stage in contender.stages:
            timers[stage][name] = Timer(contender.method, gpu, contender.head_start)
    order, least, most = list(contenders), *rounds
    shuffle = random.Random(0).shuffle
    keep_memory()
    gc.collect()
    gc.disable()
    try:
        begin, done = 0.0, -WARMUP
        while done < least or (done < most and time.perf_counter() - begin < seconds):
            if done == 0:
                begin = time.perf_counter()
            shuffle(order)
            for name in order:
                contender = contenders[name]
                for repeat in range(lead_in + 1):
                    for stage, run in contender.stages.items():
                        contender.prepare()
                        flush()
                        if repeat < lead_in:
                            run()
                        else:
                            timers[stage][name](run)
                        contender.finish()
            done += 1
    finally:
        gc.enable()
    for by_name in timers.values():
        for timer in by_name.values():
            del timer.rounds[:WARMUP]
    return timers


def mallopt(parameter: int, value: int) -> None:
    """Tell glibc's allocator; nothing happens where there is another C library."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").mallopt(parameter, value)


def keep_memory() -> None:
    """From here on the allocator keeps what is freed (M_TRIM_THRESHOLD, M_MMAP_MAX): no round pays for page faults."""
    mallopt(-1, -1)
    mallopt(-4, 0)


class Bench:
    """Measures cases on one device and collects their records. A rehearsal is a smoke run as on a GPU."""

    def __init__(self, device: str = "cpu", smoke: bool = False) -> None:
        self.gpu = device != "cpu"
        self.device = "cuda" if device == "cuda" else "cpu"
        self.smoke = smoke or device == "rehearsal"
        self.parts = 1 if self.gpu else 2 if smoke else PARTS
        # Bytes that the yardsticks read and write: more than the caches hold.
        self.copied = 2 * (1 << 20 if self.smoke else 1 << 30 if self.gpu else 1 << 27)
        self.cache_bytes = 0 if self.smoke else _cache_bytes(self.device)
        self.records: list[Record] = []
        self.left_out: list[str] = []
        self.shown: Record | None = None  # what the last case has measured first
        self.checked: set[str] = set()  # cases whose results were right: their later parts make the same

    @cached_property
    def yardsticks(self) -> dict[str, Contender]:
        """What shows the bandwidth of this moment: README.md says why there are two on a CPU."""
        source, other = (torch.rand(self.copied // 8, device=self.device) for _ in range(2))
        if self.device != "cpu":
            return {COPY: Contender({COPY: lambda: other.copy_(source)}, head_start=HEAD_START)}
        bucket = backends.choose(source).bucket([source], [0])
        return {COPY: Contender({COPY: bucket.save}), "update in place": Contender({COPY: other.neg_})}

    def leave_out(self, reason: str) -> None:
        if reason not in self.left_out:
            self.left_out.append(reason)

    def run(
        self,
        case: Case,
        contenders: dict[str, Contender],
        elements: int,
        bytes_moved: dict[str, int] | None = None,
        total: str = "",
    ) -> list[Record]:
        """Measure one part of a case: a record for each stage, and one of their sum where ``total`` names it. The first
        contender is the one that the others are baselines of. Where ``bytes_moved`` says for a stage what must move,
        the yardsticks join in, unless the cache would hold too much of it. Refuses figures that cannot be right."""
        seconds, rounds = (2.5, (11, 60)) if self.gpu else (case.seconds, case.rounds)
        rounds = (3, 3) if self.smoke else rounds
        if self.device == "cpu":
            keep_memory()
            torch.ones(ROOM * elements)  # touched and freed: what rounds need is there
        moved = {stage: n for stage, n in (bytes_moved or {}).items() if n >= CACHES * self.cache_bytes}
        yardsticks = self.yardsticks if moved else {}
        flush = self.yardsticks[COPY].stages[COPY] if moved or self.device != "cpu" else nothing
        timers = measure({**contenders, **yardsticks}, seconds, rounds, self.gpu, flush, case.lead_in)
        copies = [timer.rounds for timer in timers.pop(COPY, {}).values()]
        parts = ({total: list(timers)} if total else {}) | {stage: [stage] for stage in timers}
        records = []
        for part, stages in parts.items():
            group = ", ".join(filter(None, [part, case.group]))
            used = {name: [timers[stage][name] for stage in stages] for name in contenders}
            by_round = {name: zip(*(timer.rounds for timer in its), strict=True) for name, its in used.items()}
            sums = {name: list(map(math.fsum, rounds)) for name, rounds in by_round.items()}
            record = Record(group, case.name, next(iter(contenders)), sums, elements)
            if self.gpu:
                methods = {name: "; ".join(dict.fromkeys(t.method for t in its)) for name, its in used.items()}
                launches = {name: sum(t.launches for t in its) for name, its in used.items() if its[0].launches}
                record.facts = {"timed by": methods, "launches": launches}
            if moved.keys() >= set(stages):
                record.bytes_moved, record.copy_bytes = sum(moved[stage] for stage in stages), self.copied
                record.copy_rounds = list(map(min, zip(*copies, strict=True)))
            # The figures of a smoke run say nothing: tiny shapes may by chance be faster than the copy.
            if self.gpu and not self.smoke and (error := error_in(record)):
                self.leave_out(error)
                raise AssertionError(error)
            records.append(record)
        self.checked.add(case.id)
        return list(map(self.add, records))

    def add(self, record: Record) -> Record:
        """Keep a record, or its rounds with those of the same case's earlier part. Returns what was kept."""
        for kept in self.records:
            if kept.key == record.key and kept.rounds.keys() == record.rounds.keys():
                kept.rounds = {name: kept.rounds[name] + rounds for name, rounds in record.rounds.items()}
                kept.copy_rounds = kept.copy_rounds + record.copy_rounds
                break
        else:
            self.records.append(kept := record)
        self.shown = self.shown or kept
        return kept


def error_in(record: Record) -> str:
    """Why this cannot have been measured right on a GPU; empty if it can. A CPU's cache can hold some of a case."""
    if record.group.startswith(READ_ONLY):
        return ""
    shares = {name: statistics.median(record.shares(name) or [0.0]) for name in record.rounds if name != TORCH_COPY}
    above = [f"{name} at {100 * x:.0f} % of the copy's bandwidth" for name, x in shares.items() if x > CEILING]
    return f"{record.key}: invalid, an error in the measurement: {', '.join(above)}" if above else ""


def _cache_bytes(device: str) -> int:
    """Of the last level."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]] for size in sizes), default=0)
