"""Builds sam_fast on a machine with an NVIDIA GPU, tests it there, watches it with compute-sanitizer, measures it, and keeps what was found.

    python -m bench.gpu_check [--results bench/results] [--minutes 9] [--only build,tests]        or: make gpu-check

Uses the PyTorch of the Python that runs it and needs no network: the package is installed into that environment, editable, without build isolation.
Writes ``<device>.json`` and ``<device>.md``; a step that could not run is in both as not run, with the reason. Every step's whole output goes to
``<step>.log`` under build/gpu-check (``--logs``).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.machine import ROOT, commit_and_date, first_line

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
STEPS = ("build", "tests", "memcheck", "racecheck", "benchmarks")


@dataclass
class Step:
    """What became of one step."""

    name: str
    state: str
    seconds: float = 0.0
    detail: str = ""
    command: str = ""


class Check:
    """Runs steps one after the other within a time limit; a step that fails does not stop the next one, except the build."""

    def __init__(self, minutes: float, logs: Path, only: Sequence[str] = STEPS) -> None:
        self.deadline = time.monotonic() + 60 * minutes
        self.logs = logs
        self.only = only
        self.steps: list[Step] = []

    def run(self, name: str, command: list[str], limit: float, cwd: Path = ROOT, **environment: str) -> Step:
        """Run a command for at most ``limit`` seconds and record how it ended."""
        step = Step(name, NOT_RUN, command=" ".join(command))
        self.steps.append(step)
        limit = min(limit, self.deadline - time.monotonic())
        program = find(command[0])
        if name not in self.only:
            step.detail = "not asked for (--only)"
        elif program is None:
            step.detail = f"{command[0]} is not installed"
        elif limit < 5:
            step.detail = "the time was up"
        else:
            self._run(step, [program, *command[1:]], limit, cwd, {**os.environ, **environment})
        print(f"   {name}: {step.state}{f' ({step.seconds:.0f} s)' if step.seconds else ''}\n   {step.detail}", flush=True)
        return step

    def _run(self, step: Step, command: list[str], limit: float, cwd: Path, environment: dict[str, str]) -> None:
        print(f"-- {step.name}: {step.command}", flush=True)
        begin = time.monotonic()
        # In a process group of its own, so that what it has started can be stopped with it: the steps behind it measure.
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=limit)
            step.state = PASSED if process.returncode == 0 else FAILED
            step.detail = "\n".join(output.splitlines()[-40:]) if process.returncode else output.strip().rpartition("\n")[2]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            step.state = FAILED
            step.detail = f"stopped after {limit:.0f} s\n" + "\n".join(output.splitlines()[-20:])
        step.seconds = time.monotonic() - begin
        self.logs.mkdir(parents=True, exist_ok=True)
        (self.logs / f"{step.name}.log").write_text(output)

    def skip(self, name: str, reason: str) -> None:
        self.steps.append(Step(name, NOT_RUN, detail=reason))
        print(f"   {name}: {NOT_RUN}: {reason}", flush=True)


def find(program: str) -> str | None:
    """Where a program is; CUDA's tools are not always on the PATH."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join([f"{cuda}/bin", f"{cuda}/compute-sanitizer"]))


def describe_machine() -> dict[str, str]:
    """Device, driver and versions. Raises SystemExit where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu-check needs an NVIDIA GPU and a PyTorch that sees it: torch.cuda.is_available() is False. Nothing was run or written.")
    properties = torch.cuda.get_device_properties(0)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": first_line("nvcc", "--version", matching="release"),
        "torch": str(torch.__version__),
        "CUDA of torch": str(torch.version.cuda),
        "triton": triton_version,
        "python": sys.version.split()[0],
        **commit_and_date(),
    }


def count_tests(report: Path) -> str:
    """``7 passed, 1 skipped`` out of a JUnit file."""
    if not report.is_file():
        return "no report"
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for key in total:
            total[key] += int(suite.get(key, 0))
    passed = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
    return f"{passed} passed, {total['failures'] + total['errors']} failed, {total['skipped']} skipped"


def run_all(check: Check, machine: dict[str, str], scratch: Path) -> dict[str, Any]:
    """Every step; returns the benchmarks' output."""
    python = sys.executable
    build = check.run(
        "build",
        [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-e", "."],
        150,
        SAM_FAST_CUDA="1",
        CMAKE_CUDA_ARCHITECTURES=machine["compute capability"].replace(".", ""),
    )
    if build.state == FAILED:
        for name in ("tests", "memcheck", "racecheck", "benchmarks"):
            check.skip(name, "the build failed")
        return {}
    report = scratch / "tests.xml"
    extra = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    extra += ["--timeout=60"] if importlib.util.find_spec("pytest_timeout") else []
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors", f"--junitxml={report}"]
    tests = check.run("tests", [python, "-m", "pytest", *options, *extra, "tests"], 240)
    if tests.state != NOT_RUN:
        tests.detail = f"{count_tests(report)}\n{tests.detail}".strip()
    small = [python, "tests/gpu/small_run.py"]
    for tool in ("memcheck", "racecheck"):
        # Every tensor in an allocation of its own: within PyTorch's own blocks an access out of bounds would go unseen.
        # PyTorch itself probes for what the driver may not have: errors of the API are not ours.
        options = ["--report-api-errors", "no"] if tool == "memcheck" else []
        check.run(tool, ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9", *small], 110, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    figures = scratch / "figures.json"
    left = max(10.0, min(130.0, check.deadline - time.monotonic() - 25))
    check.run("benchmarks", [python, "-m", "bench.gpu", "--json", str(figures), "--seconds", f"{left:.0f}"], left + 25)
    return json.loads(figures.read_text()) if figures.is_file() else {}


def write_results(folder: Path, machine: dict[str, str], steps: list[Step], measured: dict[str, Any]) -> Path:
    """``<device>.json`` with everything and ``<device>.md`` to read; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, "steps": [asdict(step) for step in steps], **measured}, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(machine, steps, measured))
    return path


def as_markdown(machine: dict[str, str], steps: list[Step], measured: dict[str, Any]) -> str:
    lines = [f"# sam_fast on {machine['device']}", "", *(f"- {key}: {value}" for key, value in machine.items() if key != "device"), ""]
    lines += ["| step | result | seconds | |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {s.state} | {s.seconds:.0f} | {s.detail.splitlines()[0] if s.detail else ''} |" for s in steps]
    groups: dict[str, list[dict[str, Any]]] = {}
    for figure in measured.get("figures", []):
        groups.setdefault(figure["group"], []).append(figure)
    for group, figures in groups.items():
        lines += [
            "",
            f"## {group}",
            "",
            "| case | contender | median us | quartiles | GB/s | share of a copy | times faster than |",
            "|---|---|---|---|---|---|---|",
        ]
        for f in figures:
            rate = "" if f["gigabytes_per_second"] is None else f"{f['gigabytes_per_second']:.0f}"
            share = "" if f["share_of_copy"] is None else f"{100 * f['share_of_copy']:.0f} %"
            faster = ", ".join(f"{other} {ratio:.2f}" for other, ratio in f["times_faster_than"].items())
            low, high = (1e6 * s for s in f["spread"])
            lines.append(f"| {f['case']} | {f['contender']} | {1e6 * f['seconds']:.1f} | {low:.1f} - {high:.1f} | {rate} | {share} | {faster} |")
    if measured.get("left_out"):
        lines += ["", "Not run:", "", *(f"- {text}" for text in measured["left_out"])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu-check", help="where the steps' output goes")
    parser.add_argument("--only", default=",".join(STEPS), help="steps to run, of " + ",".join(STEPS))
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    if unknown := set(only) - set(STEPS):
        parser.error(f"--only names {', '.join(sorted(unknown))}: the steps are {', '.join(STEPS)}")
    machine = describe_machine()
    check = Check(arguments.minutes - 0.2, arguments.logs, only)
    scratch = ROOT / "build" / "gpu-check"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    measured = run_all(check, machine, scratch)
    path = write_results(arguments.results, machine, check.steps, measured)
    print(path.with_suffix(".md").read_text())
    print(f"written: {path} and {path.with_suffix('.md')}")
    return 0 if all(step.state == PASSED for step in check.steps if step.name in only) else 1


if __name__ == "__main__":
    sys.exit(main())
