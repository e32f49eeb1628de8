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


def test_a_rehearsal_ends_in_a_page_with_every_target_for_gpus(tmp_path):
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
    assert "cmake: no native module can be built" in done.stdout
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"cuda.json", "gpu-check.json", "logs/benchmarks.log"}
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    shutil.copy(ROOT / "README.md", tmp_path)
    Run({"kind": "cpu", "device": "d", "threads": "1", "torch": "t", "date": "2026-01-01"}).save(
        tmp_path / "bench" / "results" / "cpu.json"
    )
    report.main([str(tmp_path / "out" / "cuda.json"), "--root", str(tmp_path)])
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if "| GPU: " in line]
    assert len(rows) == 7
    assert {row[-1].rstrip(" |") for row in rows} <= {report.MET, report.NOT_MET}
    assert all(row[1].strip() for row in rows)
    assert "- commit: c0ffee" in page
    assert "events, after a head start" in page
    with pytest.raises(SystemExit):  # not into the project
        report.main([str(tmp_path / "out" / "cuda.json")])


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
    step = json.loads((tmp_path / "gpu-check.json").read_text())["steps"][0]
    assert (step["name"], step["state"]) == ("benchmarks", "running")
    assert ":: passed bench/" in (tmp_path / "logs" / "benchmarks.log").read_text()


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
    monkeypatch.setattr(gpu_check, "TESTS", ["-p", "bench.outcomes", "--no-summary"])
    monkeypatch.setattr(gpu_check, "installed", lambda package: "")
    monkeypatch.setattr(gpu_check, "GPU_TESTS", [str(tmp_path / "test_one.py")])
    monkeypatch.setattr(gpu_check, "OTHER_TESTS", [str(tmp_path / "test_two.py")])
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
    steps = {step["name"]: step for step in json.loads((results / "gpu-check.json").read_text())["steps"]}
    assert {name: step["state"] for name, step in steps.items()} == {
        "build": "failed",
        "tests": "passed",
        "others": "failed",
    }
    said, *_ = steps["build"]["detail"].splitlines()
    why = "SAM_FAST_CUDA is auto" if fails else "not built: no nvcc"
    assert said == f"what follows was run without the CUDA module: {why}"
    assert (results / "logs" / "build.log").read_text() == "SAM_FAST_CUDA is auto\n" + fails * "SAM_FAST_CUDA is 0\n"
    assert steps["tests"]["detail"].startswith("1 passed\n")
    assert steps["others"]["detail"].startswith("1 failed, 1 skipped\n")
    log = (results / "logs" / "others.log").read_text()
    assert "E   assert 1 == 2" in log
    assert "Skipped: NOT CHECKED" in log


def test_where_nothing_can_be_built_nothing_else_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "BUILD", [sys.executable, "-c", "import sys; sys.exit(3)"])
    assert gpu_check.main(["--device", "rehearsal", "--results", str(tmp_path), "--commit", "c"]) == 1
    steps = json.loads((tmp_path / "gpu-check.json").read_text())["steps"]
    assert [(step["name"], step["state"]) for step in steps] == [
        ("build", "failed"),
        *((name, "not run") for name in list(gpu_check.STEPS)[1:]),
    ]
    assert {step["detail"] for step in steps[1:]} == {"the build failed"}


def test_steps_end_as_passed_failed_or_not_run_with_the_reason(tmp_path):
    check = check_of(tmp_path, "build,tests,benchmarks,sanitizers,others")
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
    assert slow.detail == "stopped after 5 s\nbegun"
    assert slow.seconds < 30
    check.limit = lambda name: 4.0
    assert check.run("others", [sys.executable, "-c", ""]).detail == "the time was up"
    assert (tmp_path / "logs" / "tests.log").read_text() == "why\n"
    saved = {step["name"]: step["state"] for step in json.loads((tmp_path / "gpu-check.json").read_text())["steps"]}
    assert saved == {
        "build": "passed",
        "tests": "failed",
        "benchmarks": "not run",
        "memcheck": "not run",
        "racecheck": "failed",
        "others": "not run",
    }


@pytest.mark.parametrize(
    "only", ["build,tests,benchmarks", "sanitizers,others", "build,tests,benchmarks,sanitizers,others"]
)
def test_limits_never_add_up_to_more_than_there_is(tmp_path, monkeypatch, only):
    now = [1000.0]
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    check = check_of(tmp_path, only, minutes=9)
    for used in (1.0, 0.1):  # of its limit by each step
        check.waiting = {name: gpu_check.STEPS[name] for name in check.asked}
        now[0], limits = 1000.0, []
        for name in check.asked:
            limits.append(check.limit(name))
            now[0] += used * limits[-1]
            del check.waiting[name]
        assert sum(limits) <= 540 - gpu_check.SPARE + 1e-6 or used < 1
        assert now[0] <= 1540 - gpu_check.SPARE + 1e-6
        assert min(limits) > 30


def test_the_second_call_keeps_what_the_first_found(tmp_path):
    check_of(tmp_path, "build").run("build", [sys.executable, "-c", ""])
    check_of(tmp_path, "others").run("others", [sys.executable, "-c", ""])
    assert [step["name"] for step in json.loads((tmp_path / "gpu-check.json").read_text())["steps"]] == [
        "build",
        "others",
    ]
    check_of(tmp_path, "tests", commit="another").run("tests", [sys.executable, "-c", ""])
    assert [step["name"] for step in json.loads((tmp_path / "gpu-check.json").read_text())["steps"]] == ["tests"]


def test_all_that_is_missing_is_said_at_once_with_what_follows(monkeypatch):
    assert not [line for line in gpu_check.missing_here() if line.startswith("pytest")]
    monkeypatch.setattr(gpu_check, "find", lambda program: None)
    monkeypatch.setattr(gpu_check, "installed", lambda package: "76.1.0" if package == "setuptools" else "")
    missing = gpu_check.missing_here()
    wanted = [
        "setuptools 77 or newer",
        "cmake",
        "nvcc",
        "compute-sanitizer",
        "pybind11",
        "pytest",
        "pytest-benchmark",
        "pytest-xdist",
        "hypothesis",
    ]
    assert [line.partition(":")[0] for line in missing] == [*wanted, "pytorch_optimizer"]
    assert "left out of the peers" in missing[-1]


def test_no_more_than_eight_files():
    assert len({"gpu-check.json", "cuda.json", *(f"{step}.log" for step in gpu_check.STEPS)}) <= 8
