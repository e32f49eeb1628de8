"""What a run was made on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def first_line(*command: str, matching: str = "") -> str:
    """The first line of a command's output (that contains ``matching``); empty if it cannot run."""
    if (program := find(command[0])) is None:
        return ""
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    return next((line.strip() for line in done.stdout.splitlines() if matching in line), "")


def find(program: str) -> str | None:
    """Where a program is; CUDA's tools are not always on the PATH."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = os.pathsep.join([f"{cuda}/bin", f"{cuda}/compute-sanitizer"])
    return shutil.which(program) or shutil.which(program, path=folders)


def installed(package: str) -> str:
    """A package's version; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def describe(device: str, commit: str = "") -> dict[str, str]:
    """Device, versions, commit, date."""
    rehearsal = {"device": "none: a rehearsal on the CPU, whose figures say nothing"}
    packages = {package: installed(package) for package in ("torch", "pytorch_optimizer", "triton")}
    return {
        "kind": "cpu" if device == "cpu" else "cuda",
        **(cpu() if device == "cpu" else gpu() if device == "cuda" else rehearsal),
        **{package: version for package, version in packages.items() if version},
        "python": platform.python_version(),
        "load average": load_average(),
        **commit_and_date(commit),
    }


def commit_and_date(commit: str = "") -> dict[str, str]:
    """The commit (given where the files came without git), ``with changes`` if the tree is not clean, and the date."""
    changed = " with changes" if first_line("git", "status", "--porcelain", "--untracked-files=no") else ""
    commit = commit or first_line("git", "rev-parse", "HEAD") + changed or "unknown"
    return {"commit": commit, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def load_average() -> str:
    """At the end of a run on an idle machine: at most its number of threads."""
    return f"{os.getloadavg()[0]:.1f}"


def cpu() -> dict[str, str]:
    import torch

    from sam_fast import backends

    isa = backends.build_info().get("cpu: instruction set in use", "no native module")
    return {"device": processor(), "threads": str(torch.get_num_threads()), "instruction set": isa}


def gpu() -> dict[str, str]:
    """The first CUDA device: name, compute capability, driver and tools."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB, cache {properties.L2_cache_size / 2**20:.0f} MiB",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": first_line("nvcc", "--version", matching="release") or "not found",
        "CUDA of torch": str(torch.version.cuda),
    }


def processor() -> str:
    """The processor's name and how many of its cores this machine has."""
    info = Path("/proc/cpuinfo")
    pairs = [line.partition(":") for line in info.read_text().splitlines()] if info.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    name = facts.get("model name", platform.processor() or platform.machine())
    family = f", family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    return f"{os.cpu_count()} cores of {name}{family}"
