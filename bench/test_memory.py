"""Peak memory of training steps, each contender in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness import Bench
from bench.memory import CASE, CONTENDERS, DEFAULT, ELEMENTS
from bench.records import Memory

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "contender", [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.full]) for name in CONTENDERS]
)
def test_memory(bench: Bench, memory: list[Memory], contender: str) -> None:
    command = [sys.executable, "-m", "bench.memory", contender, "--device", bench.device]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    peak = int(done.stdout)
    # The weights and their gradients are there in any case; less was not measured right.
    assert peak > 2 * 4 * ELEMENTS
    how = "allocator" if bench.device == "cuda" else "peak RSS of a child process"
    memory.append(Memory(CASE, contender, peak, bench.device, how))
