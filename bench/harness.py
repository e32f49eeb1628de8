"""How a case is measured: its contenders take turns in one process, in random order, next to the memory's bandwidth,
which is measured in the same rounds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from bench.problem import Method, Problem, backward
from bench.records import COPY, Record
from bench.timers import BASELINE, OURS, WARMUP, DeviceTimer, Gpu, HostTimer, Rehearsal
from sam_fast import SAM, backends

PARTS = 3
"""On a CPU, cases are measured in so many parts, minutes apart, and their rounds put together: whoever shares the
machine's memory comes and goes."""
CACHES = 10
"""How many times the cache the bytes that move must be, for their rate to be the memory's: a tenth may be cached."""
BACKED_BYTES, LARGE = 12 << 30, 30_000_000
"""What the largest cases use together; and the number of elements of a large case."""


def nothing() -> None:
    pass


@dataclass
class Contender:
    """What is timed: one piece of work, or several stages one after the other, each timed by itself.

    ``prepare`` runs before and ``finish`` after each stage, untimed. ``head_start``: see timers.py; on the CPU there is
    none.
    """

    run: Callable[[], object] | dict[str, Callable[[], object]]
    prepare: Callable[[], object] = nothing
    finish: Callable[[], object] = nothing
    head_start: float | None = BASELINE

    @property
    def stages(self) -> dict[str, Callable[[], object]]:
        return self.run if isinstance(self.run, dict) else {"": self.run}


def steps_of(method: Method, gradients: Sequence[torch.Tensor], **timing: float | None) -> Contender:
    """first_step and second_step as in a training loop: each finds the gradients of a new backward pass."""
    stages = {"first_step": method.optimizer.first_step, "second_step": method.optimizer.second_step}
    head_start = OURS if isinstance(method.optimizer, SAM) else BASELINE
    timing = {"head_start": head_start, **timing}
    return Contender(stages, backward(method.params, gradients), method.optimizer.zero_grad, **timing)


@dataclass
class Plan:
    """How long to measure one part: seconds for all rounds of all contenders, and at least and at most so many."""

    seconds: float = 1.0
    rounds: tuple[int, int] = (3, 10)


class Machine:
    """Where a run's tensors are, and how their work is timed."""

    def __init__(self, kind: str, smoke: bool = False) -> None:
        self.rehearsal = kind == "rehearsal"
        self.gpu = Rehearsal() if self.rehearsal else Gpu() if kind == "cuda" else None
        self.kind = "cuda" if self.gpu else "cpu"
        """What the records are of: a rehearsal's go where a GPU's would."""
        self.device = "cpu" if self.rehearsal else kind
        self.copy_bytes = 1 << 20 if smoke or self.rehearsal else 1 << 30 if kind == "cuda" else 1 << 27
        """How much the yardsticks move: more than the caches hold."""
        self.cache_bytes = 0 if smoke or self.rehearsal else _cache_bytes(kind)

    def timer(self, head_start: float | None) -> HostTimer | DeviceTimer:
        if self.gpu and head_start is not None:
            return DeviceTimer(head_start, self.gpu)
        return HostTimer(self.gpu.synchronize if self.gpu else nothing)

    @cached_property
    def yardsticks(self) -> dict[str, Contender]:
        """What the memory gives at this moment, by a plain copy.

        On a CPU ``Tensor.copy_`` is none: it reads what it overwrites, a third more than it must. Its place is taken by
        the backup kernel on one tensor, whose stores go past the caches, and by an update in place, which some memories
        do faster. The faster of the two counts.
        """
        source = torch.rand(self.copy_bytes // 4, device=self.device)
        if self.device != "cpu":
            target = torch.empty_like(source)
            return {COPY: Contender(lambda: target.copy_(source), head_start=OURS)}
        bucket, other = backends.choose(source).bucket([source], [0]), torch.rand(self.copy_bytes // 4)
        copy, update = (lambda: bucket.save()), (lambda: other.neg_())
        return {COPY: Contender(copy, head_start=OURS), "update in place": Contender(update, head_start=OURS)}


def _cache_bytes(kind: str) -> int:
    """Of the last level."""
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]] for size in sizes), default=0)


Times = dict[str, dict[str, list[float]]]
Timers = dict[str, dict[str, Any]]


def measure(
    contenders: dict[str, Contender],
    plan: Plan,
    timer: Callable[[float | None], Any],
    flush: Callable[[], object] = nothing,
) -> tuple[Times, Timers]:
    """Seconds by stage and contender, one number for each round; and what timed them.

    A round runs every contender once, in an order drawn anew, so that none always finds the caches and the allocator as
    the same other left them. Numbers of one round belong together: they are compared with each other.
    """
    times: Times = {}
    timers: Timers = {}
    for name, contender in contenders.items():
        for stage in contender.stages:
            times.setdefault(stage, {})[name] = []
            timers.setdefault(stage, {})[name] = timer(contender.head_start)
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    settle_allocator()
    gc.disable()
    try:
        begin, rounds, done = 0.0, WARMUP + 1, 0
        while done < rounds:
            if done == 1:
                begin = time.perf_counter()  # the first round makes what is made once
            shuffle(order)
            for name in order:
                contender = contenders[name]
                for stage, run in contender.stages.items():
                    contender.prepare()
                    flush()
                    times[stage][name].append(timers[stage][name](run))
                    contender.finish()
            done += 1
            if done == WARMUP:
                least, most = plan.rounds
                rounds = WARMUP + max(least, min(most, int(plan.seconds / max(time.perf_counter() - begin, 1e-9))))
    finally:
        gc.enable()
    return {stage: {name: values[WARMUP:] for name, values in row.items()} for stage, row in times.items()}, timers


@cache
def _glibc() -> Any:
    """Its allocator's thresholds grow with the blocks that have been freed, up to 32 and 64 MiB; whether a temporary
    costs page faults would depend on which benchmarks came before. Here they start where they end up."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)
        libc.mallopt(-1, 64 << 20)
    except (OSError, AttributeError):
        return None
    return libc


def settle_allocator() -> None:
    """Give freed memory back to the system: what a check or an earlier benchmark has used must not serve this one's
    temporaries."""
    gc.collect()
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@cache
def back_memory() -> None:
    """Touch memory once, at most half of what is free: a virtual machine's host provides it when it is first touched,
    slowly, and whichever baseline comes to it first would pay for that."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.ones(min(BACKED_BYTES, free // 2), dtype=torch.uint8)


class Bench:
    """Measures cases on one machine and collects their records."""

    def __init__(self, kind: str = "cpu", full: bool = False, smoke: bool = False) -> None:
        self.machine = Machine(kind, smoke)
        self.device = self.machine.device
        self.full = full
        self.smoke = smoke or self.machine.rehearsal
        """Does it run at all? Tiny shapes (models.shrink) and a few rounds; the figures say nothing."""
        self.parts = 1 if self.machine.gpu else 2 if smoke else PARTS
        self.records: list[Record] = []
        self.shown: Record | None = None
        """What the last test has measured first, for pytest-benchmark's table."""
        self.left_out: list[str] = []
        self.case: Any = None
        """Names the test's case, whatever its part; :attr:`checked` has those whose results were right."""
        self.checked: set[Any] = set()

    def leave_out(self, reason: str) -> None:
        if reason not in self.left_out:
            self.left_out.append(reason)

    def check(self, problem: Problem, methods: dict[str, Method], **slack: float) -> None:
        """Refuse to time a wrong result. Once for each case: its other parts make the same."""
        if self.case is None or self.case not in self.checked:
            for name, method in methods.items():
                problem.check(name, method, **slack)

    def run(
        self,
        group: str,
        case: str,
        contenders: dict[str, Contender],
        *,
        elements: int,
        bytes_moved: int | dict[str, int] | None = None,
        plan: Plan | None = None,
        total: str | None = None,
        caches: int = CACHES,
        **facts: Any,
    ) -> list[Record]:
        """Measure one part of a case. The first contender is the one that the others are baselines of.

        Args:
            bytes_moved: that must move, for each stage where there are several; where given, the yardsticks join in,
                and every stage starts with caches full of what nobody needs. Left out where the cache would hold too
                much of it.
            total: name of a further record, the sum over the stages.
            caches: how many times the cache ``bytes_moved`` must be.
            facts: what else a reader of the record should know.

        Raises:
            AssertionError: a figure cannot be right (:meth:`Record.invalid`). The records are kept, and say so.
        """
        machine = self.machine
        plan = plan or Plan()
        if machine.gpu:
            plan = Plan(2.5, (11, 60))
        elif elements >= LARGE and not self.smoke:
            back_memory()
        moved = bytes_moved if isinstance(bytes_moved, dict) else {"": bytes_moved or 0}
        moved = {stage: size for stage, size in moved.items() if size and size >= caches * machine.cache_bytes}
        yardsticks = machine.yardsticks if moved else {}
        flush = machine.yardsticks[COPY].stages[""] if moved or machine.device != "cpu" else nothing
        rounds, timers = measure(
            {**contenders, **yardsticks}, Plan(0.0, (3, 3)) if self.smoke else plan, machine.timer, flush
        )
        copy_rounds = [min(both) for both in zip(*(rounds[""].pop(name) for name in yardsticks), strict=True)]
        rounds = {stage: by_name for stage, by_name in rounds.items() if by_name}
        parts = {stage: [stage] for stage in rounds}
        if total is not None:
            sums = {
                name: [math.fsum(stages) for stages in zip(*(row[name] for row in rounds.values()), strict=True)]
                for name in contenders
            }
            if moved.keys() >= rounds.keys():
                moved[total] = sum(moved.values())
            parts[total] = list(rounds)
            rounds = {total: sums, **rounds}
        facts |= {"device": machine.kind, "threads": torch.get_num_threads()}
        made = []
        for stage, by_name in rounds.items():
            sizes = (elements, moved.get(stage), copy_rounds if stage in moved else [], 2 * machine.copy_bytes)
            group_of = f"{stage}, {group}" if stage else group
            record = Record(group_of, case, next(iter(contenders)), by_name, *sizes, dict(facts))
            if machine.gpu:
                used = {name: [timers[part][name] for part in parts[stage]] for name in contenders}
                methods = {name: "; ".join(dict.fromkeys(t.method for t in its)) for name, its in used.items()}
                counts = {name: sum(t.launches or 0 for t in its) for name, its in used.items() if its[0].launches}
                record.facts |= {"timed by": methods, "launches": counts}
            made.append(self.add(record))
        self.shown = self.shown or made[0]
        wrong = {record.key: record.invalid() for record in made if record.invalid()}
        assert not wrong, "; ".join(f"{key}: {reason}" for key, reason in wrong.items())
        self.checked.add(self.case)
        return made

    def add(self, record: Record) -> Record:
        """Keep a record, or its rounds with those of the same case's earlier part. Returns what was kept."""
        alike = [r for r in self.records if r.key == record.key and r.rounds.keys() == record.rounds.keys()]
        if not alike:
            self.records.append(record)
            return record
        alike[0].rounds = {name: alike[0].rounds[name] + rounds for name, rounds in record.rounds.items()}
        alike[0].copy_rounds = alike[0].copy_rounds + record.copy_rounds
        return alike[0]


def usable(device: str) -> list[str]:
    """Backends that take this device's tensors, the preferred one first."""
    probe = torch.zeros(16, device=device)
    names = [name for name in backends.available() if backends.BACKENDS[name].rejects(probe) is None]
    return sorted(names, key=lambda name: name != backends.choose(probe).name)
