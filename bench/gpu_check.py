"""Builds, tests, measures and watches sam_fast on a machine with an NVIDIA GPU, and keeps what was found.

    python3 -m bench.gpu_check [options]

docs/gpu.md says what the steps do and what they leave behind. This uses the PyTorch of the Python that runs it and
needs no network, no make and no git: the package is installed into that Python's environment, editable, without build
isolation. A step that fails does not stop the next; where the CUDA module cannot be built, the rest goes on without it.
Exits with 0 if everything that was asked for passed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.records import ROOT, describe, find, installed, replace

PASSED, FAILED, NOT_RUN, RUNNING = "passed", "failed", "not run", "running"
STEPS = {"build": 3.0, "tests": 2.0, "benchmarks": 5.0, "memcheck": 1.5, "racecheck": 1.5, "others": 4.0}
"""Step -> its share of the time. What one does not use goes to the next."""
SANITIZERS = ("memcheck", "racecheck")
ASKED = {step: "sanitizers" if step in SANITIZERS else step for step in STEPS}
"""Step -> its name in --only."""
SPARE = 12.0
"""Seconds for starting and ending."""

PIP = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check"]
BUILD = [*PIP, "--no-build-isolation", "-v", "-e", "."]
BUILD_INFO = ROOT / "sam_fast" / "_build_info.json"
"""What setup.py has built, and why not the rest."""
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
TESTS = ["-p", "bench.outcomes", "--no-summary", "-m", "gpu and not nightly", "--continue-on-collection-errors"]
NATIVE = "no native module can be built, neither for GPUs nor for the CPU"
PROGRAMS = ("cmake", "nvcc", "compute-sanitizer")
NEEDED = {
    "setuptools 77 or newer": "the package cannot be built, and nothing runs",
    "cmake": NATIVE,
    "nvcc": "the cuda backend is neither built, tested nor measured; triton and torch are. Exit status 1",
    "compute-sanitizer": "no sanitizers",
    "pybind11": NATIVE,
    "pytest": "no tests and no benchmarks",
    "pytest-benchmark": "no benchmarks",
    "pytest-xdist": "tests run one after the other and may not end in time",
    "hypothesis": "tests/test_properties.py does not run",
    "pytorch_optimizer": "it is left out of the peers; its target is not measured",
}
"""Program or package -> what follows where it is missing."""
GPU_TESTS, OTHER_TESTS = ["tests/gpu"], ["tests", "--ignore=tests/gpu"]


@dataclass
class Step:
    """What became of one step."""

    name: str
    state: str = NOT_RUN
    seconds: float = 0.0
    detail: str = ""
    command: str = ""
    commit: str = ""


class Check:
    """Runs steps one after the other within a time limit and writes down after each what became of it."""

    def __init__(self, arguments: argparse.Namespace, machine: dict[str, str], missing: list[str]) -> None:
        self.arguments, self.machine, self.missing = arguments, machine, missing
        self.deadline = time.monotonic() + 60 * arguments.minutes - SPARE
        self.file = arguments.results / "gpu-check.json"
        self.logs = arguments.logs or arguments.results / "logs"
        self.asked = [name for name in STEPS if ASKED[name] in arguments.only]
        self.waiting = {name: STEPS[name] for name in self.asked}
        earlier = json.loads(self.file.read_text())["steps"] if self.file.is_file() else []
        steps = {step["name"]: Step(**step) for step in earlier if step["commit"] == machine["commit"]}
        steps |= {name: Step(name, commit=machine["commit"]) for name in self.asked}
        self.steps = {name: steps[name] for name in STEPS if name in steps}

    def limit(self, name: str) -> float:
        """Seconds that a step may take now: its share of what is left."""
        return (self.deadline - time.monotonic()) * self.waiting[name] / sum(self.waiting.values())

    def run(self, name: str, command: list[str], **environment: str) -> Step:
        """Run a step's command and record how it ended."""
        step, limit, program = self.steps[name], self.limit(name), find(command[0])
        step.command = " ".join([*(f"{key}={value}" for key, value in environment.items()), *command])
        if program is None:
            return self.done(name, step.state, f"{command[0]} is not installed")
        if limit < 5:
            return self.done(name, step.state, "the time was up")
        step.state, step.detail = RUNNING, "was running when this was written"
        self.write()
        print(f"-- {name}, at most {limit:.0f} s: {step.command}", flush=True)
        begin = time.monotonic()
        self.logs.mkdir(parents=True, exist_ok=True)
        path = self.logs / f"{name}.log"
        with path.open("a" if name == "build" else "w") as log:
            # In a process group of its own, so that what it has started can be stopped with it: other steps measure.
            whole, env = [program, *command[1:]], {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
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
        return self.done(name, PASSED if code == 0 else FAILED, "\n".join(stopped + tail))

    def done(self, name: str, state: str, detail: str) -> Step:
        """Record how a step has ended."""
        step = self.steps[name]
        step.state, step.detail = state, detail
        self.waiting.pop(name, None)
        self.write()
        print(f"   {name}: {state} ({step.seconds:.0f} s)\n   {detail}", flush=True)
        return step

    def write(self) -> None:
        content = {"machine": self.machine, "missing": self.missing, "steps": list(map(asdict, self.steps.values()))}
        replace(self.file, json.dumps(content, indent=1) + "\n")


def is_here(what: str) -> bool:
    if what.startswith("setuptools"):
        return int(installed("setuptools").partition(".")[0] or 0) >= 77
    return bool(find(what) if what in PROGRAMS else installed(what))


def missing_here() -> list[str]:
    return [f"{what}: {follows}" for what, follows in NEEDED.items() if not is_here(what)]


def use_wheels(folder: Path) -> None:
    """Install wheels into a folder of their own, for this process and those that it starts."""
    site = ROOT / "build" / "gpu-check-site"
    wheels = [str(path) for path in sorted(folder.resolve().glob("*.whl"))]
    if not wheels:
        raise SystemExit(f"--wheels: there is no .whl in {folder}")
    subprocess.run([*PIP, "--quiet", "--upgrade", "--target", str(site), *wheels], check=True)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


def cuda_module() -> str:
    """``built``, or why it is not."""
    return json.loads(BUILD_INFO.read_text())["sam_fast._cuda"] if BUILD_INFO.is_file() else "not built"


def build(check: Check) -> bool:
    """Install the package. setup.py leaves out what cannot be built; CUDA kernels are left out, too, if they take too
    long. False if nothing can be installed."""
    (check.logs / "build.log").unlink(missing_ok=True)
    architecture, failed = check.machine.get("compute capability", "9.0").replace(".", ""), ""
    for switch in ("auto", "0"):
        check.waiting["build"] = STEPS["build"]
        step = check.run("build", BUILD, CMAKE_CUDA_ARCHITECTURES=architecture, SAM_FAST_CUDA=switch)
        if step.state != FAILED:
            break
        failed = failed or step.detail
    if (built := step.state == PASSED) and (reason := cuda_module()) != "built":
        # The later ones serve what needs no CUDA module; the step itself has failed.
        why = failed or f"{reason}\n{step.detail}"
        check.done("build", FAILED, f"what follows was run without the CUDA module: {why}")
    return built


def tests(check: Check, name: str, paths: list[str]) -> None:
    processes = max(1, min(12, 3 * (os.cpu_count() or 1) // 4))
    options = [*TESTS, *["-n", str(processes)] * bool(installed("pytest-xdist"))]
    options += ["--timeout=60"] * bool(installed("pytest-timeout"))
    step = check.run(name, [*PYTEST, *options, *paths], OMP_NUM_THREADS="1")
    log = check.logs / f"{name}.log"
    if step.seconds and log.is_file():
        # as bench/outcomes.py has written them: "7 passed, 1 skipped"
        found = Counter(re.findall(r"^:: (\w+) ", log.read_text(errors="replace"), re.MULTILINE))
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(found.items())) or "no test"
        if step.state == PASSED and "passed" not in found:
            step.state = NOT_RUN
        step.detail = f"{outcomes}\n{step.detail}"
        check.write()


def benchmarks(check: Check) -> None:
    """Chosen cases of the suite; what there is no time for is listed in the file."""
    saved = check.arguments.results.resolve() / "cuda.json"
    saved.unlink(missing_ok=True)  # an earlier run's must not pass for this one's
    minutes = max(check.limit("benchmarks") - 30, 5) / 60  # so that the last case ends in time
    command = [*PYTEST, "-p", "bench.outcomes", "-rN", "--benchmark-quiet", "bench", "--benchmark-only"]
    command += ["--device", check.arguments.device, "--minutes", f"{minutes:.2f}", "-k", check.arguments.select]
    check.run("benchmarks", [*command, "--save", str(saved), "--commit", check.machine["commit"]])


def sanitizer(check: Check, tool: str) -> None:
    if (reason := cuda_module()) != "built":
        check.done(tool, NOT_RUN, f"the CUDA module: {reason}")
        return
    # Every tensor in an allocation of its own: within PyTorch's own blocks an access out of bounds would go unseen.
    # PyTorch itself probes for what the driver may not have: errors of the API are not ours.
    extra = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = ["compute-sanitizer", "--tool", tool, *extra, "--error-exitcode", "9", sys.executable]
    check.run(tool, [*command, "tests/gpu/small_run.py"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def run_all(check: Check) -> None:
    """Every step that was asked for, in order."""
    for name in check.asked:
        if name == "build":
            if not build(check):
                for later in list(check.waiting):
                    check.done(later, NOT_RUN, "the build failed")
                return
        elif name == "benchmarks":
            benchmarks(check)
        elif name in SANITIZERS:
            sanitizer(check, name)
        else:
            tests(check, name, GPU_TESTS if name == "tests" else OTHER_TESTS)


def require_gpu() -> None:
    try:
        import torch

        if torch.cuda.is_available():
            return
        seen = "torch.cuda.is_available() is False"
    except ImportError:
        seen = f"{sys.executable} has no PyTorch"
    raise SystemExit(f"gpu-check needs an NVIDIA GPU and a PyTorch that sees it: {seen}. Nothing was run or written.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, names = parser.add_argument, list(dict.fromkeys(ASKED.values()))
    results = ROOT / "build" / "gpu-check"
    add("--results", type=Path, default=results, help="for cuda.json and gpu-check.json (default: build/gpu-check)")
    add("--logs", type=Path, help="where the steps' output goes (default: logs in --results)")
    add("--commit", default="", help="the commit of these files, where they came without git")
    steps = "steps to run, of (and by default) " + ",".join(names)
    add("--only", default=names, type=lambda given: given.split(","), help=steps)
    add("--minutes", type=float, default=17.0, help="for everything (default: 17)")
    add("--wheels", type=Path, help="a folder of wheels for the steps, installed beside the environment")
    rehearsal = "rehearsal: the benchmarks on the CPU, to try this program"
    add("--device", default="cuda", choices=["cuda", "rehearsal"], help=rehearsal)
    add("--select", default="", help="the benchmarks to run, as pytest's -k")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.only) - set(names):
        parser.error(f"--only names {', '.join(sorted(unknown))}: the steps are {', '.join(names)}")
    if arguments.wheels is not None:
        use_wheels(arguments.wheels)
    if arguments.device == "cuda":
        require_gpu()
    missing = missing_here()
    print("\n   ".join(["missing here:", *missing] if missing else ["nothing is missing"]), flush=True)
    check = Check(arguments, describe(arguments.device, arguments.commit), missing)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is stopped on the way out
    run_all(check)
    for step in check.steps.values():
        what, *_ = step.detail.splitlines() or [""]
        print(f"{step.name:12s} {step.state:8s} {step.seconds:4.0f} s  {what}")
    print(f"written: {check.file}, the figures beside it, the logs in {check.logs}")
    return 0 if all(check.steps[name].state == PASSED for name in check.asked) else 1


if __name__ == "__main__":
    sys.exit(main())
