"""How a piece of work is timed: on the CPU by the host's clock, on a GPU by events or by the durations of its kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

WARMUP = 2
"""Rounds that are not counted. On a GPU the first counts launches, the second decides between events and kernels."""

OURS, BASELINE = 3e-3, 20e-3
"""Head starts in seconds: longer than the host needs to launch one step of ours, and of what launches several kernels for each parameter."""
WITH_LAUNCHES = 0.0
"""No head start: the device is idle when the work begins, and launching counts."""
HOST_ALONE = None
"""Only until the call returns: the device's work is waited for untimed."""

CYCLES_PER_SECOND = 2e9
"""Of a GPU, about."""


class Timer(Protocol):
    """Times the rounds of one piece of work."""

    method: str
    launches: int | None

    def __call__(self, run: Callable[[], object]) -> float: ...


class HostTimer:
    """By the host's clock; a device is waited for before and after, untimed."""

    method = "host clock"
    launches: int | None = None

    def __init__(self, synchronize: Callable[[], object] = lambda: None) -> None:
        self.synchronize = synchronize

    def __call__(self, run: Callable[[], object]) -> float:
        self.synchronize()
        begin = time.perf_counter()
        run()
        taken = time.perf_counter() - begin
        self.synchronize()
        return taken


class DeviceTimer:
    """By a GPU's events. With a head start the device sleeps while the host launches, so that the work is timed and not the launches.

    Where the device wakes up before the host has launched everything, as it does when there are more launches than the driver's queue holds, the
    times are the sums of the kernels' durations from the profiler, without the gaps between them.
    """

    def __init__(self, head_start: float, cuda: Any = torch.cuda) -> None:
        self.head_start = head_start
        self.cuda = cuda
        self.rounds = 0
        self.by_kernels = False
        self.launches: int | None = None

    @property
    def method(self) -> str:
        if self.by_kernels:
            return "sum of the kernels' durations"
        return f"events, {1e3 * self.head_start:g} ms head start" if self.head_start else "events, with launches"

    def __call__(self, run: Callable[[], object]) -> float:
        self.rounds += 1
        if self.head_start and (self.by_kernels or self.rounds == 1):
            durations = kernel_seconds(run, self.cuda)
            self.launches = len(durations)
            return sum(durations)
        begin, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        # What was queued before must not run while the host launches: without a head start the work would get one.
        self.cuda.synchronize()
        if self.head_start:
            self.cuda._sleep(int(self.head_start * CYCLES_PER_SECOND))
        begin.record()
        run()
        late = begin.query()
        end.record()
        end.synchronize()
        if self.head_start and self.rounds == WARMUP:
            self.by_kernels = late
        return float(begin.elapsed_time(end)) / 1e3


def kernel_seconds(run: Callable[[], object], cuda: Any = torch.cuda) -> list[float]:
    """How long each kernel, copy and memset that ``run`` launches takes."""
    kind = "CUDA" if cuda is torch.cuda else "CPU"
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profile:
        run()
        cuda.synchronize()
    # Not profile.events(), which takes seconds for thousands of launches.
    events = profile.profiler.kineto_results.events()
    device = getattr(torch.autograd.DeviceType, kind)
    return [e.duration_ns() / 1e9 for e in events if e.device_type() == device and not e.is_user_annotation()]


class Rehearsal:
    """Stands in for ``torch.cuda`` where there is no GPU, to show that everything runs. Its times are the host's and say nothing."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Rehearsal.Event) -> float:
            return 1e3 * (end.at - self.at)

    def synchronize(self) -> None:
        pass

    def _sleep(self, cycles: int) -> None:
        pass
