"""Runs the rows of the table in cases.py: ``pytest bench --benchmark-only``."""

from __future__ import annotations

from bench.harness import Bench, Case


def test(bench: Bench, case: Case) -> None:
    case.measure(bench, case, **case.options)
