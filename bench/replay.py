"""Shows to pytest-benchmark what the harness has measured."""

from __future__ import annotations

from typing import Any

from bench.records import Record


class Replay:
    """pytest-benchmark's timer: it advances only by what the harness has measured, so that its table shows the same
    numbers for every device.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-12  # a timer that stood still would have no precision to determine
        return self.now

    def show(self, benchmark: Any, record: Record) -> None:
        rounds = iter(record.rounds[record.target])

        def one() -> None:
            self.now += next(rounds)

        benchmark.group = f"{record.group} | {record.case}"
        benchmark.extra_info.update(record.facts)
        benchmark.pedantic(one, rounds=len(record.rounds[record.target]))


REPLAY = Replay()
