"""How a piece of work is timed: on a device by its events, on the CPU by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Clock:
    """Times work on a device with events, on the CPU with the host's clock."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.head_start = 40_000_000
        """Cycles, about 20 ms: longer than the reference needs to launch thousands of kernels."""

    def seconds(self, run: Callable[[], object]) -> float:
        if self.device == "cpu":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The device sleeps some milliseconds while the host runs ahead: what is timed is the work, not the launches.
        torch.cuda._sleep(self.head_start)
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
