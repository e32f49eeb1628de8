"""What gpu-check does and what it leaves behind, as far as it can be seen without a GPU: in rehearsals, and with tiny
suites instead of the real ones.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from bench import gpu_check, report
from bench.records import Run

ROOT = Path(__file__).parent.parent
# of xdist: it disables benchmarks
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
REHEARSAL = [
    sys.executable,
    "-m",
    "bench.gpu_check",
    "--device",
    "rehearsal",
    "--only",
    "benchmarks",
    "--minutes",
    "5",
    "--commit",
    "c0ffee",
]
OF_TARGETS = "(optimizer_step-SGD- and (resnet50 or vit or gpt2)) or in_a_loop-161_x_8-"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        gpu_check.main(["--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_ends_in_a_page_with_every_target_for_gpus(tmp_path, monkeypatch):
    """Where there is no git and no make: gpu-check, and the report of the file that it leaves."""
    command = [
        *REHEARSAL,
        "--results",
        str(tmp_path / "out"),
        "--logs",
        str(tmp_path / "out" / "logs"),
        "--select",
        OF_TARGETS,
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**ENVIRONMENT, "PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing here: cmake, " in done.stdout
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"cuda.json", "gpu-check.json", "logs/benchmarks.log"}
    (tmp_path / "docs").mkdir()
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    shutil.copy(tmp_path / "out" / "cuda.json", results)
    shutil.copy(ROOT / "README.md", tmp_path)
    Run({"device": "d", "threads": "1", "torch": "t", "date": "2026-01-01"}).save(results / "cpu.json")
    report.main(["--root", str(tmp_path)])
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if "| GPU: " in line]
    assert len(rows) == 7
    assert {row[-1].rstrip(" |") for row in rows} <= {report.MET, report.NOT_MET}
    assert all(row[1].strip() for row in rows)
    assert "- commit: c0ffee" in page
    assert "events, after a head start" in page
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(SystemExit):  # not into the project
        report.main([])


def test_a_run_that_is_killed_keeps_what_was_measured(tmp_path):
    process = subprocess.Popen(
        [*REHEARSAL, "--results", str(tmp_path), "--select", "optimizer_step and SGD"],
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    saved = tmp_path / "cuda.json"
    deadline = time.monotonic() + 120
    while not saved.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert 1 <= len(Run.load(saved).records) < 10
    assert states(tmp_path) == {"benchmarks": "running"}
    assert " PASSED" in (tmp_path / "logs" / "benchmarks.log").read_text()


def steps(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads((folder / "gpu-check.json").read_text())["steps"]


def states(folder: Path) -> dict[str, str]:
    return {name: step["state"] for name, step in steps(folder).items()}


def check_of(tmp_path: Path, only: str, minutes: float = 1.0, commit: str = "c") -> gpu_check.Check:
    arguments = Namespace(minutes=minutes, results=tmp_path, logs=None, only=only.split(","))
    return gpu_check.Check(arguments, {"commit": commit}, [])


@pytest.mark.parametrize("fails", [False, True], ids=["left out by setup.py", "fails, as when it takes too long"])
def test_a_build_without_the_cuda_module_goes_on_and_is_a_failure(tmp_path, monkeypatch, fails):
    (tmp_path / "test_one.py").write_text("def test_right(): pass\n")
    (tmp_path / "test_two.py").write_text(
        "import pytest\ndef test_wrong(): assert 1 == 2\n@pytest.mark.skip(reason='NOT CHECKED')\ndef test_not(): "
        "pass\n"
    )
    script = (
        "import os, sys; cuda = os.environ['SAM_FAST_CUDA']; print('SAM_FAST_CUDA is', cuda); "
        f"sys.exit(3 if {fails} and cuda == 'auto' else 0)"
    )
    (tmp_path / "info.json").write_text('{"sam_fast._cuda": "not built: no nvcc"}')
    monkeypatch.setattr(gpu_check, "BUILD_INFO", tmp_path / "info.json")
    monkeypatch.setattr(gpu_check, "BUILD", [sys.executable, "-c", script])
    monkeypatch.setattr(gpu_check, "SELECTION", ["--no-summary"])
    monkeypatch.setattr(gpu_check, "installed", lambda package: "")
    suites = {"tests": [str(tmp_path / "test_one.py")], "others": [str(tmp_path / "test_two.py")]}
    monkeypatch.setattr(gpu_check, "TESTS", suites)
    results = tmp_path / "out"
    code = gpu_check.main(
        [
            "--device",
            "rehearsal",
            "--results",
            str(results),
            "--commit",
            "c",
            "--only",
            "build,tests,others",
            "--minutes",
            "2",
        ]
    )
    assert code == 1
    assert states(results) == {"build": "failed", "tests": "passed", "others": "failed"}
    found = {name: step["detail"].splitlines() for name, step in steps(results).items()}
    assert found["build"][-1] == "what follows was run without the CUDA module: not built: no nvcc"
    assert (results / "logs" / "build.log").read_text() == "SAM_FAST_CUDA is auto\n" + fails * "SAM_FAST_CUDA is 0\n"
    assert " 1 passed in " in found["tests"][-1]
    assert " 1 failed, 1 skipped in " in found["others"][-1]
    log = (results / "logs" / "others.log").read_text()
    assert "E   assert 1 == 2" in log
    assert "Skipped: NOT CHECKED" in log


def test_where_nothing_can_be_built_nothing_else_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "BUILD", [sys.executable, "-c", "import sys; sys.exit(3)"])
    assert gpu_check.main(["--device", "rehearsal", "--results", str(tmp_path), "--commit", "c"]) == 1
    assert states(tmp_path) == {**dict.fromkeys(gpu_check.SHARES, "not run"), "build": "failed"}
    assert {step["detail"] for name, step in steps(tmp_path).items() if name != "build"} == {"was not reached"}


def test_steps_end_as_passed_failed_or_not_run_with_the_reason(tmp_path):
    check = check_of(tmp_path, ",".join(gpu_check.SHARES))
    assert check.run("build", [sys.executable, "-c", "print('well')"]).state == "passed"
    bad = check.run("tests", [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"])
    assert (bad.state, bad.detail) == ("failed", "why")
    missing = check.run("memcheck", ["no-such-tool-anywhere"])
    assert (missing.state, missing.detail) == ("not run", "no-such-tool-anywhere is not installed")
    check.limit = lambda name: 5.0
    slow = check.run(
        "racecheck", [sys.executable, "-c", "import subprocess; print('begun'); subprocess.run(['sleep', '60'])"]
    )
    assert slow.state == "failed"
    assert slow.detail == "begun\nstopped after 5 s"
    assert slow.seconds < 30
    check.limit = lambda name: 4.0
    assert check.run("others", [sys.executable, "-c", ""]).detail == "the time was up"
    assert (tmp_path / "logs" / "tests.log").read_text() == "why\n"
    assert states(tmp_path) == {
        "build": "passed",
        "tests": "failed",
        "benchmarks": "not run",
        "memcheck": "not run",
        "racecheck": "failed",
        "others": "not run",
    }


def test_a_suite_that_was_skipped_as_a_whole_was_not_run(tmp_path, monkeypatch):
    (tmp_path / "test_one.py").write_text("import pytest\n@pytest.mark.skip\ndef test_not(): pass\n")
    monkeypatch.setattr(gpu_check, "SELECTION", ["--no-summary"])
    monkeypatch.setattr(gpu_check, "TESTS", {"tests": [str(tmp_path / "test_one.py")]})
    gpu_check.tests(check_of(tmp_path, "tests"), "tests")
    assert states(tmp_path) == {"tests": "not run"}


@pytest.mark.parametrize("xdist", ["", "3"], ids=["one process", "xdist"])
def test_a_killed_run_has_written_why_tests_failed_or_were_skipped(tmp_path, monkeypatch, xdist):
    log = tmp_path / "out" / "logs" / "tests.log"
    reasons = ["E   assert 1 == 2", "Skipped: NOT CHECKED", "No module named 'no_such_module'"]
    (tmp_path / "test_bad.py").write_text("import no_such_module\n")
    (tmp_path / "test_one.py").write_text(
        "import os, pathlib, pytest, time\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='NOT CHECKED')\n"
        "def test_not(): pass\n"
        "def test_last():\n"
        f"    def missing(): return [why for why in {reasons!r} if why not in pathlib.Path({str(log)!r}).read_text()]\n"
        "    deadline = time.monotonic() + 40\n"
        "    while missing() and time.monotonic() < deadline: time.sleep(0.05)\n"
        f"    os.kill(os.getppid() if {bool(xdist)} else os.getpid(), 9)\n"
    )
    monkeypatch.setattr(gpu_check, "TESTS", {"tests": [str(tmp_path)]})
    monkeypatch.setattr(gpu_check, "SELECTION", ["--no-summary", "--continue-on-collection-errors"])
    monkeypatch.setattr(gpu_check, "installed", lambda package: xdist if package == "pytest-xdist" else "")
    gpu_check.tests(check_of(tmp_path / "out", "tests"), "tests")
    assert states(tmp_path / "out") == {"tests": "failed"}
    assert [why for why in reasons if why not in log.read_text()] == []


@pytest.mark.parametrize("only", ["build,tests,benchmarks", "memcheck,racecheck,others", ",".join(gpu_check.SHARES)])
def test_limits_never_add_up_to_more_than_there_is(tmp_path, monkeypatch, only):
    now = [1000.0]
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    check = check_of(tmp_path, only, minutes=9)
    for used in (1.0, 0.1):  # of its limit by each step
        now[0], limits = 1000.0, []
        for name in check.asked:
            limits.append(check.limit(name))
            now[0] += used * limits[-1]
        assert sum(limits) <= 540 - gpu_check.SPARE + 1e-6 or used < 1
        assert now[0] <= 1540 - gpu_check.SPARE + 1e-6
        assert min(limits) > 30


def test_the_second_call_keeps_what_the_first_found(tmp_path):
    check_of(tmp_path, "build").run("build", [sys.executable, "-c", ""])
    check_of(tmp_path, "others").run("others", [sys.executable, "-c", ""])
    assert states(tmp_path) == {"build": "passed", "others": "passed"}
    check_of(tmp_path, "tests", commit="another").run("tests", [sys.executable, "-c", ""])
    assert states(tmp_path) == {"tests": "passed"}


def test_all_that_is_missing_is_said_at_once(monkeypatch):
    assert "pytest" not in gpu_check.missing_here()
    monkeypatch.setattr(gpu_check, "find", lambda program: None)
    monkeypatch.setattr(gpu_check, "installed", lambda package: "76.1.0" if package == "setuptools" else "")
    assert gpu_check.missing_here() == [*gpu_check.PROGRAMS, *gpu_check.PACKAGES, "setuptools 77 or newer"]


def test_no_more_than_eight_files():
    assert len({"gpu-check.json", "cuda.json", *(f"{step}.log" for step in gpu_check.SHARES)}) <= 8
