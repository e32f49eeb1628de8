"""Builds, tests, measures and watches sam_fast on a machine with an NVIDIA GPU, and keeps what was found: docs/gpu.md.
The package is installed into the environment of the Python that runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.records import ROOT, describe, find, installed, replace

PASSED, FAILED, NOT_RUN, RUNNING = "passed", "failed", "not run", "running"
SHARES = {"build": 3.0, "tests": 2.0, "benchmarks": 5.0, "memcheck": 1.5, "racecheck": 1.5, "others": 4.0}
"""Step -> its share of the time. What one does not use goes to the next."""
SPARE = 12.0  # seconds for starting and ending

BUILD = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-v", "-e", "."]
BUILD += ["--no-deps", "--no-index", "--no-build-isolation"]  # no network
BUILD_INFO = ROOT / "sam_fast" / "_build_info.json"  # what setup.py has built, and why not the rest
PYTEST = [sys.executable, "-m", "pytest", "-v", "-p", "bench.outcomes", "-p", "no:cacheprovider", "--tb=short"]
SELECTION = ["--no-summary", "-m", "gpu and not nightly", "--continue-on-collection-errors"]
TESTS = {"tests": ["tests/gpu"], "others": ["tests", "--ignore=tests/gpu"]}
# PyTorch probes for what the driver may not have: such errors of the API are not ours.
SANITIZERS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
# What is needed; docs/gpu.md says what follows where it is missing.
PROGRAMS = ("cmake", "nvcc", "compute-sanitizer")
PACKAGES = ("pybind11", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "pytorch_optimizer")


@dataclass
class Step:
    state: str = NOT_RUN
    seconds: float = 0.0
    detail: str = "was not reached"  # then the last lines of its output; the last one sums it up


class Check:
    """Runs steps one after the other within a time limit and writes down after each what became of it."""

    def __init__(self, arguments: argparse.Namespace, machine: dict[str, str], missing: list[str]) -> None:
        self.arguments, self.machine, self.missing = arguments, machine, missing
        self.deadline = time.monotonic() + 60 * arguments.minutes - SPARE
        self.file = arguments.results / "gpu-check.json"
        self.logs = arguments.logs or arguments.results / "logs"
        self.asked = [name for name in SHARES if name in arguments.only]
        earlier = json.loads(self.file.read_text()) if self.file.is_file() else {"machine": {"commit": None}}
        same = earlier["machine"]["commit"] == machine["commit"]
        self.steps = {name: Step(**step) for name, step in earlier["steps"].items()} if same else {}
        self.steps |= {name: Step() for name in self.asked}

    def limit(self, name: str) -> float:
        """Seconds that a step may take now: its share of what is left."""
        ahead = self.asked[self.asked.index(name) :]
        return (self.deadline - time.monotonic()) * SHARES[name] / sum(SHARES[step] for step in ahead)

    def run(self, name: str, command: list[str], **environment: str) -> Step:
        """Run a step's command and record how it ended."""
        step, limit, program = self.steps[name], self.limit(name), find(command[0])
        if program is None:
            return self.done(name, NOT_RUN, f"{command[0]} is not installed")
        if limit < 5:
            return self.done(name, step.state, "the time was up")
        step.state, step.detail = RUNNING, "was running when this was written"
        self.write()
        print(f"-- {name}, at most {limit:.0f} s: {' '.join(command)}", flush=True)
        begin = time.monotonic()
        self.logs.mkdir(parents=True, exist_ok=True)
        path = self.logs / f"{name}.log"
        with path.open("a" if name == "build" else "w") as log:
            env = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
            # In a process group of its own, so that what it has started can be stopped with it: other steps measure.
            whole = [program, *command[1:]]
            process = subprocess.Popen(
                whole, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        step.seconds = round(time.monotonic() - begin, 1)
        tail = path.read_text(errors="replace").splitlines()[-1 if code == 0 else -30 :]
        stopped = [f"stopped after {limit:.0f} s"] if code is None else []
        return self.done(name, PASSED if code == 0 else FAILED, "\n".join(tail + stopped))

    def done(self, name: str, state: str, detail: str) -> Step:
        step = self.steps[name]
        step.state, step.detail = state, detail
        self.write()
        print(f"   {name}: {state} ({step.seconds:.0f} s)\n   {detail}", flush=True)
        return step

    def write(self) -> None:
        content = {"machine": self.machine, "missing": self.missing, "steps": self.steps}
        replace(self.file, json.dumps(content, indent=1, default=vars) + "\n")


def missing_here() -> list[str]:
    missing = [program for program in PROGRAMS if not find(program)]
    missing += [package for package in PACKAGES if not installed(package)]
    if int(installed("setuptools").partition(".")[0] or 0) < 77:
        missing.append("setuptools 77 or newer")
    return missing


def build(check: Check) -> bool:
    """Install the package, without the CUDA kernels if they take too long. False if nothing can be installed."""
    (check.logs / "build.log").unlink(missing_ok=True)
    architecture = check.machine.get("compute capability", "9.0").replace(".", "")
    for switch in ("auto", "0"):
        step = check.run("build", BUILD, CMAKE_CUDA_ARCHITECTURES=architecture, SAM_FAST_CUDA=switch)
        if step.state != FAILED:
            break
    if step.state != PASSED:
        return False
    if (reason := json.loads(BUILD_INFO.read_text())["sam_fast._cuda"]) != "built":
        # The later steps serve what needs no CUDA module; this one has failed.
        check.done("build", FAILED, f"{step.detail}\nwhat follows was run without the CUDA module: {reason}")
    return True


def tests(check: Check, name: str) -> None:
    processes = max(1, min(12, 3 * (os.cpu_count() or 1) // 4))
    parallel = ["-n", str(processes)] if installed("pytest-xdist") else []
    timeout = ["--timeout=60"] if installed("pytest-timeout") else []  # a kernel that hangs
    step = check.run(name, [*PYTEST, *SELECTION, *parallel, *timeout, *TESTS[name]], OMP_NUM_THREADS="1")
    if step.state == PASSED and " passed" not in step.detail:
        check.done(name, NOT_RUN, step.detail)  # all were skipped


def benchmarks(check: Check) -> None:
    saved = check.arguments.results.resolve() / "cuda.json"
    saved.unlink(missing_ok=True)  # an earlier run's must not pass for this one's
    minutes = max(check.limit("benchmarks") - 30, 5) / 60  # so that the last case ends in time
    command = [*PYTEST, "-rN", "--benchmark-quiet", "bench", "--benchmark-only", "-k", check.arguments.select]
    command += ["--device", check.arguments.device, "--minutes", f"{minutes:.2f}"]
    check.run("benchmarks", [*command, "--save", str(saved), "--commit", check.machine["commit"]])


def sanitizer(check: Check, tool: str) -> None:
    command = ["compute-sanitizer", "--tool", tool, *SANITIZERS[tool], "--error-exitcode", "9", sys.executable]
    # Every tensor in an allocation of its own: within PyTorch's own blocks an access out of bounds would go unseen.
    check.run(tool, [*command, "tests/gpu/small_run.py"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def run_all(check: Check) -> None:
    """Every step that was asked for, in order. One that fails does not stop the next, unless nothing was installed."""
    for name in check.asked:
        if name in TESTS:
            tests(check, name)
        elif name in SANITIZERS:
            sanitizer(check, name)
        elif name == "benchmarks":
            benchmarks(check)
        elif not build(check):
            break


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    add, names = parser.add_argument, list(SHARES)
    results = ROOT / "build" / "gpu-check"
    add("--results", type=Path, default=results, help="for cuda.json and gpu-check.json (default: build/gpu-check)")
    add("--logs", type=Path, help="where the steps' output goes (default: logs in --results)")
    add("--commit", default="", help="the commit of these files, where they came without git")
    steps = "steps to run, of (and by default) " + ",".join(names)
    add("--only", default=names, type=lambda given: given.split(","), help=steps)
    add("--minutes", type=float, default=17.0, help="for everything (default: 17)")
    rehearsal = "rehearsal: the benchmarks on the CPU, to try this program"
    add("--device", default="cuda", choices=["cuda", "rehearsal"], help=rehearsal)
    add("--select", default="", help="the benchmarks to run, as pytest's -k")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.only) - set(names):
        parser.error(f"--only names {', '.join(sorted(unknown))}: the steps are {', '.join(names)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu-check needs an NVIDIA GPU and a PyTorch that sees it. Nothing was run or written.")
    missing = missing_here()
    print("missing here:", ", ".join(missing) or "nothing", flush=True)
    check = Check(arguments, describe(arguments.device, arguments.commit), missing)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is stopped on the way out
    run_all(check)
    for name, step in check.steps.items():
        *_, what = step.detail.splitlines() or [""]
        print(f"{name:12s} {step.state:8s} {step.seconds:4.0f} s  {what}")
    print(f"written: {check.file}, the figures beside it, the logs in {check.logs}")
    return 0 if all(check.steps[name].state == PASSED for name in check.asked) else 1


if __name__ == "__main__":
    sys.exit(main())
