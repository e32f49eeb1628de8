"""Builds the native modules with CMake. Everything else about the package is in pyproject.toml.

Environment variables:
    SAM_FAST_NATIVE=0     build no native module: the package then runs on PyTorch alone.
    SAM_FAST_CUDA=0|auto  the CUDA module; this version has none to build, so anything else is an error.
    SAM_FAST_WERROR=1     compiler warnings are errors.
    SAM_FAST_SANITIZE=... sanitizers to build with, e.g. address,undefined.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("SAM_FAST_NATIVE", "1") != "0"
BUILD_INFO = "_build_info.json"

if os.environ.get("SAM_FAST_CUDA", "auto") not in ("0", "auto"):
    raise SystemExit("sam_fast: SAM_FAST_CUDA asks for the CUDA module, but this version has no CUDA sources: use 0 or auto")


def what_is_built() -> dict[str, str]:
    """Module -> "built", or why it is not built."""
    if not NATIVE:
        return {"sam_fast._cpu": "not built: SAM_FAST_NATIVE=0", "sam_fast._cuda": "not built: SAM_FAST_NATIVE=0"}
    return {"sam_fast._cpu": "built", "sam_fast._cuda": "not built: this version has no CUDA sources"}


class BuildPy(build_py):
    """Leaves a note of what was built in the package, for ``python -m sam_fast info``."""

    def run(self) -> None:
        super().run()
        # An editable install uses the source folder itself.
        folder = ROOT / "sam_fast" if self.editable_mode else Path(self.build_lib) / "sam_fast"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BUILD_INFO).write_text(json.dumps(what_is_built(), indent=2) + "\n")
        report()


class CMakeBuild(build_ext):
    """Builds every extension in one CMake run."""

    def run(self) -> None:
        if not self.extensions:
            return
        try:
            self.build_all()
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            raise SystemExit(
                f"sam_fast: building the native modules failed ({error}).\n"
                "A C++17 compiler is needed. Without one, SAM_FAST_NATIVE=0 installs the package without native kernels."
            ) from error

    def build_all(self) -> None:
        target = Path(self.get_ext_fullpath(self.extensions[0].name)).parent.resolve()
        target.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve() / "cmake"
        # Never reuse a configuration: it names a ninja and a pybind11 of an isolated build environment that is gone.
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        import pybind11

        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DSAM_FAST_WERROR={'ON' if os.environ.get('SAM_FAST_WERROR', '0') != '0' else 'OFF'}",
            f"-DSAM_FAST_SANITIZE={os.environ.get('SAM_FAST_SANITIZE', '')}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)


def report() -> None:
    print("sam_fast: " + "; ".join(f"{module}: {state}" for module, state in what_is_built().items()), flush=True)


setup(
    ext_modules=[Extension("sam_fast._cpu", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
