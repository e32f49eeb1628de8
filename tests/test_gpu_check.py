"""What `make gpu-check` does with what it finds, as far as it can be seen without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_check

ROOT = Path(__file__).parent.parent
MACHINE = {"device": "NVIDIA Test 80GB", "compute capability": "9.0", "driver": "1", "commit": "c", "date": "d"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_check", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "needs an NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_measuring_program_runs_and_its_figures_are_written(tmp_path):
    """On the CPU, with tiny shapes: every case but those of the cuda backend."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--smoke", "--json", str(figures)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    measured = json.loads(figures.read_text())
    groups = {figure["group"] for figure in measured["figures"]}
    operations = {"grad_norm", "perturb", "restore", "restore_sgd", "restore_adam"}
    assert groups == {"first_step", "first_step with its launches", "host time of first_step", *operations, "first_step + restore + SGD"}
    path = gpu_check.write_results(tmp_path / "results", MACHINE, [gpu_check.Step("build", "passed", 3.0, "fine")], measured)
    assert path.name == "nvidia-test-80gb.json"
    saved = json.loads(path.read_text())
    assert saved["machine"] == MACHINE
    assert saved["figures"] == measured["figures"]
    table = path.with_suffix(".md").read_text()
    assert "| build | passed | 3 | fine |" in table
    assert "order of perturb: not run" in table


def test_steps_end_as_passed_failed_or_not_run_with_the_reason(tmp_path):
    check = gpu_check.Check(1, tmp_path, ["good", "bad", "missing", "slow", "late"])
    assert check.run("good", [sys.executable, "-c", "print('well')"], 30).state == "passed"
    bad = check.run("bad", [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"], 30)
    assert (bad.state, bad.detail) == ("failed", "why")
    missing = check.run("missing", ["no-such-tool-anywhere"], 30)
    assert (missing.state, missing.detail) == ("not run", "no-such-tool-anywhere is not installed")
    slow = check.run("slow", [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"], 6)
    assert slow.state == "failed"
    assert "stopped after 6 s" in slow.detail
    assert check.run("other", [sys.executable], 30).detail == "not asked for (--only)"
    assert (tmp_path / "bad.log").read_text() == "why\n"
    check.deadline = 0.0
    assert check.run("late", [sys.executable, "-c", ""], 30).detail == "the time was up"


def test_junit_files_are_counted(tmp_path):
    report = tmp_path / "r.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>')
    assert gpu_check.count_tests(report) == "5 passed, 2 failed, 2 skipped"
    assert gpu_check.count_tests(tmp_path / "none.xml") == "no report"
