"""Prints the report at the end of a benchmark run."""

from __future__ import annotations

import math
from itertools import groupby

import pytest
import torch

from bench.harness import ROWS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for group, rows in groupby(sorted(ROWS, key=lambda r: r.group), key=lambda r: r.group):
        members = list(rows)
        names = list(members[0].baselines)
        write("")
        write(f"== {group}: median ms" + "".join(f", times faster than {name}" for name in names))
        for row in members:
            line = f"{row.case:28s} {row.elements / 1e6:8.2f}M {row.seconds * 1e3:10.4f} ms"
            for name in names:
                line += f"  {name} {row.baselines[name] * 1e3:9.3f} ms = {row.ratio(name):5.2f}x"
            rate = row.bandwidth()
            if rate is not None:
                line += f"  {rate / 1e9:6.1f} GB/s = {100 * rate / row.copy_bandwidth:4.0f} % of a copy's {row.copy_bandwidth / 1e9:.1f}"
            write(line)
        for name in names:
            mean = math.exp(sum(math.log(row.ratio(name)) for row in members) / len(members))
            write(f"geometric mean over {len(members)}: {mean:.2f} times faster than {name}; least: {min(r.ratio(name) for r in members):.2f}")
