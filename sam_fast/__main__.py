"""``python -m sam_fast info``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

import torch

import sam_fast
from sam_fast import backends


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Wrong usage exits with 2, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m sam_fast", description="Sharpness-Aware Minimization for PyTorch with fused kernels."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, usable backends, how the native modules were built")
    parser.parse_args(argv)
    return info()


def info() -> int:
    """Print versions, backends and build; returns 0."""
    _section(
        "Versions",
        {
            "sam_fast": sam_fast.__version__,
            "python": f"{platform.python_version()} ({platform.system()}, {platform.machine()})",
            "torch": f"{torch.__version__}, {torch.get_num_threads()} CPU thread(s)",
            "triton": _triton(),
            "CUDA": _cuda(),
        },
    )
    unusable = backends.why_not()
    _section(
        "Backends",
        {
            **dict.fromkeys(backends.available(), "usable"),
            **{name: f"not usable: {why}" for name, why in unusable.items()},
        },
    )
    if os.environ.get(backends.BACKEND_VARIABLE):
        _section("Environment", {backends.BACKEND_VARIABLE: _forced()})
    broken = backends.unusable_devices()
    if broken:
        _section("Devices", {where: f"not usable: {why}" for where, why in broken.items()})
    _section("Native modules", backends.build_info() or {"none": "see the backends above for the reason"})
    return 0


def _section(title: str, entries: dict[str, str]) -> None:
    width = max(map(len, entries))
    print(title)
    for name, text in entries.items():
        print(f"  {name:<{width}}  {text}")


def _forced() -> str:
    try:
        backends.forced(None)
    except (ValueError, RuntimeError) as error:
        return f"no optimizer can be made: {error}"
    return f"{os.environ[backends.BACKEND_VARIABLE]} for every parameter"


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if torch.version.hip:
        return f"this torch is built for ROCm {torch.version.hip}"
    if torch.version.cuda is None:
        return "this torch is built without it"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no usable device"
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return f"{torch.version.cuda}; {names}"


if __name__ == "__main__":
    sys.exit(main())
