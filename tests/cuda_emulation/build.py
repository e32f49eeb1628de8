"""Compiles csrc/cuda with g++ and the headers beside this file into a Python module that executes the kernels on the
CPU.

python tests/cuda_emulation/build.py OUT.so [--sanitize thread] [--csrc DIR]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


def operations(csrc: Path = CSRC) -> list[str]:
    """The operations that have a file of their own; step.cu is compiled once for each of ``steps()``."""
    return sorted(path.stem for path in (csrc / "cuda").glob("*.cu") if path.stem != "step")


def steps(csrc: Path = CSRC) -> list[str]:
    """The structs of ``SAM_STEPS`` in csrc/steps.h: step.cu is compiled once for each, as CMakeLists.txt has it."""
    found = re.findall(r"^ *X\([a-z0-9_]+, ([A-Za-z0-9]+)\)", (csrc / "steps.h").read_text(), re.MULTILINE)
    if not found:
        raise RuntimeError(f"{csrc}/steps.h has no SAM_STEPS")
    return found


def build(out: Path, sanitize: str = "", csrc: Path = CSRC, optimize: int = 1) -> Path:
    """Build ``csrc``/cuda into ``out``; the objects are kept beside it.

    Raises RuntimeError with the compiler's output.
    """
    options = ["-std=c++20", f"-O{optimize}", "-g", "-fPIC", "-pthread", "-ffp-contract=off", "-fvisibility=hidden"]
    options += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
    options += [f"-I{path}" for path in (HERE, sysconfig.get_path("include"), pybind11.get_include())]
    if sanitize:
        options += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    out.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str, step: str = "") -> Path:
        target = out.with_name(f"{out.stem}.{source}{step}.o")
        definitions = [f"-DSAM_STEP={step}"] if step else []
        _run(*options, *definitions, "-x", "c++", "-c", csrc / "cuda" / source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = ["bindings.cpp", *(f"{operation}.cu" for operation in operations(csrc))]
        jobs = [*((source, "") for source in sources), *(("step.cu", step) for step in steps(csrc))]
        objects = list(pool.map(lambda job: compile_one(*job), jobs))
    _run(*options, "-shared", *objects, "-o", out)
    return out


def _run(*arguments: str | Path) -> None:
    command = [os.environ.get("CXX", "g++"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sanitize", default="", help="for -fsanitize, e.g. thread or address,undefined")
    parser.add_argument("--csrc", type=Path, default=CSRC)
    parser.add_argument("--optimize", type=int, default=1, help="for -O; 3 to time the host's part")
    arguments = parser.parse_args()
    build(arguments.out, arguments.sanitize, arguments.csrc, arguments.optimize)
