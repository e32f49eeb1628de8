"""A pytest plugin that writes why a test failed or was skipped as soon as it is known: a run that is killed has it in
its log, beside the outcomes that ``-v`` writes."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.passed:
        print(f"\n{report.nodeid}: {report.longreprtext}", flush=True)


pytest_collectreport = pytest_runtest_logreport
