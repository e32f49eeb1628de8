"""A pytest plugin that writes each test's outcome as soon as it is known, failures with their reason: a run that is
killed has them in its log. ``python -m pytest -p bench.outcomes --no-summary``
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

MARK = ":: "


@pytest.hookimpl(wrapper=True)
def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> Generator[None, tuple, tuple]:
    category, *_ = yield
    if category:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        line = f"{MARK}{category} {report.nodeid} {reason}".rstrip()
        config.get_terminal_writer().line(line, flush=True)
    return category, "", ""


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        print(f"{MARK}error {report.nodeid} {report.longreprtext}", flush=True)
