"""How work is timed: on the CPU by the host's clock, on a GPU by events or by the durations of its kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

WARMUP = 3
"""Rounds that are not counted. On a GPU the first counts launches, the second decides between events and kernels. On a
CPU the allocator has by then what all contenders need."""
OURS, BASELINE = 3e-3, 20e-3
"""Head starts in seconds: longer than the host needs to launch our step, or several kernels for each parameter."""
WITH_LAUNCHES = 0.0
"""No head start: the device is idle when the work begins, and launching counts."""
HOST_ALONE = None
"""Only until the call returns: the device's work is waited for untimed."""


class HostTimer:
    """By the host's clock. A device is waited for before and after, untimed."""

    method, launches = "host clock", None

    def __init__(self, synchronize: Callable[[], object] = lambda: None) -> None:
        self.synchronize = synchronize

    def __call__(self, run: Callable[[], object]) -> float:
        self.synchronize()
        begin = time.perf_counter()
        run()
        taken = time.perf_counter() - begin
        self.synchronize()
        return taken


class Gpu:
    """What a timer asks of the current CUDA device."""

    Event: Any = torch.cuda.Event
    kind = "CUDA"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def sleep(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * 2e9))  # cycles per second, about

    def kernel_seconds(self, run: Callable[[], object]) -> list[float]:
        """How long each kernel, copy and memset that ``run`` launches takes; empty where the profiler may not look."""
        with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, self.kind)]) as profile:
            run()
            self.synchronize()
        # Not profile.events(), which takes seconds for thousands of launches.
        events, device = profile.profiler.kineto_results.events(), getattr(torch.autograd.DeviceType, self.kind)
        return [e.duration_ns() / 1e9 for e in events if e.device_type() == device and not e.is_user_annotation()]


class Rehearsal(Gpu):
    """Stands in where there is no GPU, to show that everything runs. Its times are the host's and say nothing."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.synchronize = lambda: None

        def record(self) -> None:
            self.at = time.perf_counter()

        def query(self) -> bool:
            return False

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * float(end.at - self.at)

    def synchronize(self) -> None: ...

    def sleep(self, seconds: float) -> None: ...

    def kernel_seconds(self, run: Callable[[], object]) -> list[float]:
        return [HostTimer()(run)]


class DeviceTimer:
    """By a GPU's events. With a head start the device sleeps while the host launches: the work is timed, not the
    launches.

    Where the device wakes up before the host has launched everything, as it does when there are more launches than the
    driver's queue holds, the times are the sums of the kernels' durations from the profiler, without the gaps between.
    """

    def __init__(self, head_start: float, gpu: Gpu) -> None:
        self.head_start, self.gpu = head_start, gpu
        self.rounds, self.late = 0, False
        self.launches: int | None = None

    @property
    def method(self) -> str:
        if not self.head_start:
            return "events, with launches"
        if not self.late:
            return f"events, {1e3 * self.head_start:g} ms head start"
        too_short = "events; the head start was too short and there is no profiler"
        return "sum of the kernels' durations" if self.launches else too_short

    def __call__(self, run: Callable[[], object]) -> float:
        self.rounds += 1
        if self.head_start and (self.rounds == 1 or (self.late and self.launches)):
            durations = self.gpu.kernel_seconds(run)
            self.launches = len(durations) or None
            return sum(durations)
        begin, end = self.gpu.Event(enable_timing=True), self.gpu.Event(enable_timing=True)
        # What was queued before must not run while the host launches: without a head start the work would get one.
        self.gpu.synchronize()
        if self.head_start:
            self.gpu.sleep(self.head_start)
        begin.record()
        run()
        late = begin.query()
        end.record()
        end.synchronize()
        if self.head_start and self.rounds == 2:  # the first was the profiler's
            self.late = late
        return float(begin.elapsed_time(end)) / 1e3
