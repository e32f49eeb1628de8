"""Runs the rows of the table in cases.py: ``pytest bench --benchmark-only``."""

from __future__ import annotations

from bench.cases import Case
from bench.harness import Bench


def test(bench: Bench, case: Case) -> None:
    case.measure(bench, case.group, case.name, **case.options)
