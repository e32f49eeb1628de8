"""How work is timed: on the CPU by the host's clock, on a GPU by events or by the durations of its kernels."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

WARMUP = 3
"""Rounds that are not counted. On a GPU the first counts launches, the second decides between events and kernels. On a
CPU the allocator has by then what all contenders need."""
HEAD_START, BASELINE_HEAD_START = 3e-3, 20e-3
"""In seconds: longer than the host needs to launch our step, or several kernels for each parameter."""
WITH_LAUNCHES = 0.0
"""No head start: the device is idle when the work begins, and launching counts."""
HOST_ALONE = None
"""Only until the call returns: the device's work is waited for untimed."""

Work = Callable[[], object]


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


class Gpu:
    """What a timer asks of the current CUDA device."""

    kind = "CUDA"

    def by_events(self, run: Work, head_start: float) -> tuple[float, bool]:
        """Seconds by events, and whether the device was awake before the host had launched everything. During the head
        start the device sleeps and the host launches: the work is timed, not the launches."""
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

    def by_kernels(self, run: Work) -> list[float]:
        """Seconds of each kernel, copy and memset that ``run`` launches; empty where the profiler may not look."""
        with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, self.kind)]) as profile:
            run()
            synchronize()
        # Not profile.events(), which takes seconds for thousands of launches.
        events, device = profile.profiler.kineto_results.events(), getattr(torch.autograd.DeviceType, self.kind)
        return [e.duration_ns() / 1e9 for e in events if e.device_type() == device and not e.is_user_annotation()]


class Rehearsal(Gpu):
    """Stands in where there is no GPU, to show that everything runs. Its times are the host's and say nothing."""

    def by_events(self, run: Work, head_start: float) -> tuple[float, bool]:
        return by_host(run), False

    def by_kernels(self, run: Work) -> list[float]:
        return [by_host(run)]


class Timer:
    """Times one stage of one contender, round by round, in seconds: ``rounds``.

    On a GPU by events; with a head start, which is too short where there are more launches than the driver's queue
    holds, by the sums of the kernels' durations from the profiler, without the gaps between.
    """

    def __init__(self, head_start: float | None, gpu: Gpu | None) -> None:
        self.head_start, self.gpu = head_start, gpu
        self.rounds: list[float] = []
        self.late, self.launches, self.method = False, 0, ""

    def __call__(self, run: Work) -> None:
        if self.gpu is None or self.head_start is HOST_ALONE:
            seconds, self.method = by_host(run), "host clock"
        elif self.head_start and (not self.rounds or (self.late and self.launches)):
            durations = self.gpu.by_kernels(run)
            self.launches, self.method = len(durations), "sum of the kernels' durations"
            seconds = sum(durations)
        else:
            seconds, late = self.gpu.by_events(run, self.head_start)
            how = f"{1e3 * self.head_start:g} ms head start" if self.head_start else "with launches"
            self.method = f"events, {how}"
            if self.head_start and len(self.rounds) == 1:  # the first was the profiler's
                self.late = late
            if self.late:
                self.method = "events; the head start was too short and there is no profiler"
        self.rounds.append(seconds)
