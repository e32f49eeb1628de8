"""What a run leaves behind: what it was made on, and records of rounds."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COPY, TORCH_COPY = "streaming copy", "torch copy_"


@dataclass
class Record:
    """The rounds of one case: ``rounds[name][i]`` is what the contender called name took in round i, in seconds."""

    group: str
    case: str
    target: str  # the contender that the others are baselines of
    rounds: dict[str, list[float]]
    elements: int = 0
    bytes_moved: int | None = None  # that must move; None: not bound by memory
    copy_rounds: list[float] = field(default_factory=list)  # what copy_bytes took, streamed as fast as memory lets them
    copy_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.group} | {self.case}"

    def shares(self, name: str) -> list[float]:
        """Of the bandwidth measured in the same round; empty where memory is no bound."""
        per_round = zip(self.rounds[name], self.copy_rounds, strict=False)
        return [(self.bytes_moved or 0) / seconds / (self.copy_bytes / copy) for seconds, copy in per_round]


@dataclass
class Run:
    """One run of the suite, as it is saved."""

    machine: dict[str, str]
    records: list[Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write everything, all at once: whoever is killed meanwhile leaves the file as it was."""
        data = asdict(self)
        for record in data["records"]:
            for rounds in (record["copy_rounds"], *record["rounds"].values()):
                rounds[:] = [float(f"{seconds:.4g}") for seconds in rounds]
        records = ",\n  ".join(json.dumps(r) for r in data.pop("records"))  # a line each: readable differences
        replace(path, json.dumps(data, indent=1)[:-2] + f',\n "records": [\n  {records}\n ]\n}}\n')

    @classmethod
    def load(cls, path: Path) -> Run:
        data = json.loads(path.read_text())
        return cls(**{**data, "records": [Record(**record) for record in data["records"]]})


def replace(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def output(*command: str) -> str:
    """What a command prints; empty if it cannot run."""
    if (program := find(command[0])) is None:
        return ""
    return subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


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
    where = cpu() if device == "cpu" else gpu() if device == "cuda" else rehearsal
    versions = {name: version for name in ("torch", "pytorch_optimizer", "triton") if (version := installed(name))}
    return {**where, **versions, "python": platform.python_version(), **commit_and_date(commit)}


def commit_and_date(commit: str = "") -> dict[str, str]:
    """The commit (given where the files came without git), ``with changes`` if the tree is not clean, and the date."""
    changed = " with changes" if output("git", "status", "--porcelain", "--untracked-files=no") else ""
    commit = commit or output("git", "rev-parse", "HEAD") + changed or "unknown"
    return {"commit": commit, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


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
        "memory": f"{properties.total_memory / 2**30:.1f} GiB, cache {properties.L2_cache_size / 2**20:.0f} MiB",
        "driver": output("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": output("nvcc", "--version").rpartition("release ")[2].partition(",")[0] or "not found",
        "CUDA of torch": str(torch.version.cuda),
    }


def processor() -> str:
    """The processor's name and how many of its cores this machine has."""
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark, which may be missing where a GPU is checked

    info = get_cpu_info()
    family = f", family {info['family']} model {info['model']}" if "family" in info else ""
    return f"{os.cpu_count()} cores of {info.get('brand_raw', info['arch'])}{family}"
