"""Every example runs, learns, and says so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def output_of(example: Path) -> str:
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.stem != "resume"], ids=lambda e: e.stem)
def test_example_learns(example):
    accuracies = re.findall(r"test accuracy ([\d.]+)%", output_of(example))
    assert len(accuracies) == 5
    assert float(accuracies[-1]) > 90.0


def test_resume_ends_with_the_same_bits():
    (resume,) = [e for e in EXAMPLES if e.stem == "resume"]
    assert output_of(resume).strip().endswith("the same bits")
