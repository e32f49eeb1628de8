"""How a case is measured: its contenders take turns in one process, in random order, next to the memory's bandwidth,
which is measured in the same rounds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from bench.problem import Method, backward
from bench.records import COPY, Record
from bench.timers import BASELINE, OURS, WARMUP, DeviceTimer, Gpu, HostTimer, Rehearsal
from sam_fast import SAM, backends

PARTS = 3
"""On a CPU, cases are measured in so many parts, minutes apart, and their rounds put together: whoever shares the
machine's memory comes and goes."""
ROOM = 8
"""How many times the parameters' memory is made ready for temporaries and gradients, which lie between others'."""
CACHES = 10
"""How many times the cache the bytes that move must be, for their rate to be the memory's."""


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
    timing = {"head_start": OURS if isinstance(method.optimizer, SAM) else BASELINE, **timing}
    return Contender(stages, backward(method.params, gradients), method.optimizer.zero_grad, **timing)


Times = dict[str, dict[str, list[float]]]
Timers = dict[str, dict[str, Any]]


def measure(
    contenders: dict[str, Contender],
    seconds: float,
    rounds: tuple[int, int],
    timer: Callable[[float | None], Any],
    flush: Callable[[], object] = nothing,
) -> tuple[Times, Timers]:
    """Seconds by stage and contender, one number for each round; and what timed them.

    A round runs every contender once, in an order drawn anew, so that none always finds the caches and the allocator as
    the same other left them. Numbers of one round belong together: they are compared with each other. There are as many
    rounds as ``seconds`` allow, but at least and at most ``rounds``, and some of warm-up that are not counted.
    """
    times: Times = {}
    timers: Timers = {}
    for name, contender in contenders.items():
        for stage in contender.stages:
            times.setdefault(stage, {})[name] = []
            timers.setdefault(stage, {})[name] = timer(contender.head_start)
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
                for stage, run in contender.stages.items():
                    contender.prepare()
                    flush()
                    times[stage][name].append(timers[stage][name](run))
                    contender.finish()
            done += 1
    finally:
        gc.enable()
    return {stage: {name: values[WARMUP:] for name, values in row.items()} for stage, row in times.items()}, timers


@cache
def glibc() -> Any:
    """For its allocator's settings; None where there is another C library."""
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


@cache
def keep_memory() -> None:
    """From here on the allocator keeps what is freed (M_TRIM_THRESHOLD, M_MMAP_MAX). By default it gives memory back
    where it can, by chance, and a baseline's temporaries would cost page faults in one round and none in the next. So
    after the warm-up hardly a round pays for them, nor for a virtual machine's host that provides memory slowly."""
    if libc := glibc():
        libc.mallopt(-1, -1)
        libc.mallopt(-4, 0)


class Bench:
    """Measures cases on one device and collects their records.

    ``device``: "cpu", "cuda", or "rehearsal", which does as on a GPU, but on the CPU. ``smoke``: does it run at all?
    Tiny shapes (models.shrink) and a few rounds; the figures say nothing.
    """

    def __init__(self, device: str = "cpu", smoke: bool = False) -> None:
        self.rehearsal = device == "rehearsal"
        self.gpu = Rehearsal() if self.rehearsal else Gpu() if device == "cuda" else None
        self.kind = "cuda" if self.gpu else "cpu"
        """What the records are of: a rehearsal's go where a GPU's would."""
        self.device = "cpu" if self.rehearsal else device
        self.smoke = smoke or self.rehearsal
        self.parts = 1 if self.gpu else 2 if smoke else PARTS
        self.copied = 2 * (1 << 20 if self.smoke else 1 << 30 if self.gpu else 1 << 27)
        """Bytes that the yardsticks read and write: more than the caches hold."""
        self.cache_bytes = 0 if self.smoke else _cache_bytes(self.device)
        self.records: list[Record] = []
        self.left_out: list[str] = []
        self.shown: Record | None = None
        """What the last test has measured first, for pytest-benchmark's table."""
        self.case: Any = None
        """The case that is measured, whatever its part; :attr:`checked` has those whose results were right."""
        self.checked: set[Any] = set()

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
        source = torch.rand(self.copied // 8, device=self.device)
        if self.device != "cpu":
            target = torch.empty_like(source)
            return {COPY: Contender(lambda: target.copy_(source), head_start=OURS)}
        bucket, other = backends.choose(source).bucket([source], [0]), torch.rand_like(source)
        copy, update = (lambda: bucket.save()), (lambda: other.neg_())
        return {COPY: Contender(copy, head_start=OURS), "update in place": Contender(update, head_start=OURS)}

    def leave_out(self, reason: str) -> None:
        if reason not in self.left_out:
            self.left_out.append(reason)

    def unchecked(self) -> bool:
        """Whether this case's results are still to be checked: its later parts make the same."""
        return self.case is None or self.case not in self.checked

    def run(
        self,
        group: str,
        case: str,
        contenders: dict[str, Contender],
        *,
        elements: int,
        bytes_moved: dict[str, int] | None = None,
        seconds: float = 1.0,
        rounds: tuple[int, int] = (5, 60),
        total: str | None = None,
        **facts: Any,
    ) -> list[Record]:
        """Measure one part of a case. The first contender is the one that the others are baselines of.

        Args:
            bytes_moved: that must move, by stage; where given, the yardsticks join in, and every stage starts with
                caches full of what nobody needs. Left out where the cache would hold too much of it.
            seconds, rounds: how long to measure this part on a CPU; on a GPU all cases take the same.
            total: name of a further record, the sum over the stages.
            facts: what else a reader of the record should know.

        Raises:
            AssertionError: a figure cannot be right (:meth:`Record.invalid`). The records are kept, and say so.
        """
        if self.smoke:
            rounds = (3, 3)
        elif self.gpu:
            seconds, rounds = 2.5, (11, 60)
        if self.device == "cpu":
            keep_memory()
            torch.ones(ROOM * elements)  # touched and freed: what rounds need is there
        moved = {stage: n for stage, n in (bytes_moved or {}).items() if n >= CACHES * self.cache_bytes}
        yardsticks = self.yardsticks if moved else {}
        flush = self.yardsticks[COPY].stages[""] if moved or self.device != "cpu" else nothing
        times, timers = measure({**contenders, **yardsticks}, seconds, rounds, self.timer, flush)
        copy_rounds = [min(both) for both in zip(*(times[""].pop(name) for name in yardsticks), strict=True)]
        stages = [stage for stage, by_name in times.items() if by_name]
        parts = {stage: [stage] for stage in stages}
        if total is not None:
            parts = {total: stages, **parts}
            moved |= {total: sum(moved.values())} if moved.keys() >= set(stages) else {}
        facts |= {"device": self.kind, "threads": torch.get_num_threads()}
        made = []
        for stage, its in parts.items():
            by_name = {
                n: [math.fsum(s) for s in zip(*(times[part][n] for part in its), strict=True)] for n in contenders
            }
            record = Record(f"{stage}, {group}".removeprefix(", "), case, next(iter(contenders)), by_name, elements)
            record.facts = facts | (_how(contenders, [timers[part] for part in its]) if self.gpu else {})
            if stage in moved:
                record.bytes_moved, record.copy_rounds, record.copy_bytes = moved[stage], copy_rounds, self.copied
            made.append(self.add(record))
        wrong = "; ".join(f"{record.key}: {reason}" for record in made if (reason := record.invalid()))
        assert not wrong, wrong
        self.checked.add(self.case)
        return made

    def add(self, record: Record) -> Record:
        """Keep a record, or its rounds with those of the same case's earlier part. Returns what was kept."""
        kept = next((r for r in self.records if r.key == record.key and r.rounds.keys() == record.rounds.keys()), None)
        if kept is None:
            kept = record
            self.records.append(kept)
        else:
            kept.rounds = {name: kept.rounds[name] + rounds for name, rounds in record.rounds.items()}
            kept.copy_rounds = kept.copy_rounds + record.copy_rounds
        self.shown = self.shown or kept
        return kept


def _how(names: Iterable[str], timers: list[dict[str, Any]]) -> dict[str, Any]:
    """How each contender was timed in these stages, and its launches in all of them."""
    used = {name: [by_name[name] for by_name in timers] for name in names}
    methods = {name: "; ".join(dict.fromkeys(t.method for t in its)) for name, its in used.items()}
    counts = {name: sum(t.launches or 0 for t in its) for name, its in used.items() if its[0].launches}
    return {"timed by": methods, "launches": counts}


def _cache_bytes(device: str) -> int:
    """Of the last level."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]] for size in sizes), default=0)
