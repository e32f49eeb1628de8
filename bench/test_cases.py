"""Runs the rows of the table in cases.py: ``pytest bench --benchmark-only``."""

from __future__ import annotations

from typing import Any

from bench.harness import Bench, Case


def test(benchmark: Any, bench: Bench, case: Case) -> None:
    benchmark.pedantic(case.measure, (bench, case), case.options)
