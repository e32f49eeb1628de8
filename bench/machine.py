"""What a run was made on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def first_line(*command: str, matching: str = "") -> str:
    """The first line of a command's output (that contains ``matching``); empty if it cannot run."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return next((line.strip() for line in done.stdout.splitlines() if matching in line), "")


def commit_and_date() -> dict[str, str]:
    """The commit, ``with changes`` if the tree is not clean, and the date."""
    changed = first_line("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": first_line("git", "rev-parse", "HEAD") + (" with changes" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def describe(device: str) -> dict[str, str]:
    """Device, versions, commit, date."""
    import torch

    import sam_fast

    if device == "cpu":
        isa = sam_fast.backends.build_info().get("cpu: instruction set in use", "no native module")
        name = {"device": processor(), "threads": str(torch.get_num_threads()), "instruction set": isa}
    else:
        properties = torch.cuda.get_device_properties(0)
        name = {"device": properties.name, "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
    versions = {package: importlib.metadata.version(package) for package in ("torch", "pytorch_optimizer") if _installed(package)}
    load = f"{os.getloadavg()[0]:.1f}"  # at the end of a run on an idle machine: at most its number of threads
    return {"kind": device, **name, **versions, "python": sys.version.split()[0], "load average": load, **commit_and_date()}


def processor() -> str:
    """The processor's name and how many of its cores this machine has."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    count = sum(line.startswith("processor") for line in lines)
    name = facts.get("model name", platform.processor() or platform.machine())
    family = f", family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    return f"{count} cores of {name}{family}" if count else name


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
