"""Builds the native modules with CMake. Everything else about the package is in pyproject.toml.

Environment variables:
    SAM_FAST_NATIVE=auto  build the native modules; where that fails, warn and leave them out: the package then runs on
                          PyTorch alone (the default). 1: a failure is an error; 0: build none, for a pure wheel.
    SAM_FAST_CUDA=auto    build the CUDA module if nvcc is found: in CUDA_HOME if that is set, else on the PATH or in
                          /usr/local/cuda (the default). 1: not finding it is an error; 0: never build it.
    CMAKE_CUDA_ARCHITECTURES=90;100
                          the GPUs to build for, in CMake's notation (default: 75, 80, 90 and, from CUDA 12.8 on, 100
                          and 120).
    TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX"
                          the same in PyTorch's notation.
    SAM_FAST_WERROR=1     compiler warnings are errors.
    SAM_FAST_SANITIZE=... sanitizers to build with, e.g. address,undefined.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
BUILD_INFO = "_build_info.json"


def switch(name: str) -> str:
    """The variable's value: 0, 1 or auto, which is the default."""
    value = os.environ.get(name, "auto")
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"sam_fast: {name}={value!r} is unknown: use 0, 1 or auto")
    return value


NATIVE, CUDA = switch("SAM_FAST_NATIVE"), switch("SAM_FAST_CUDA")

INSTALLED = "/usr/local/cuda/bin"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else the one on the PATH, else where CUDA installs itself."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path=INSTALLED)


NVCC = find_nvcc() if NATIVE != "0" and CUDA != "0" else None

if CUDA == "1" and NVCC is None:
    raise SystemExit(
        "sam_fast: SAM_FAST_CUDA=1 asks for the CUDA module, but there is no nvcc in CUDA_HOME, on the PATH or in "
        "/usr/local/cuda, or SAM_FAST_NATIVE=0 is set"
    )


def what_is_built() -> dict[str, str]:
    """Module -> "built", or why it is not built, as planned; the build corrects it."""
    if NATIVE == "0":
        return {"sam_fast._cpu": "not built: SAM_FAST_NATIVE=0", "sam_fast._cuda": "not built: SAM_FAST_NATIVE=0"}
    reason = "SAM_FAST_CUDA=0" if CUDA == "0" else "no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda"
    return {"sam_fast._cpu": "built", "sam_fast._cuda": "built" if NVCC else f"not built: {reason}"}


def note(folder: Path, state: dict[str, str]) -> None:
    """Write what was built into a file beside the modules, for ``python -m sam_fast info``, and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BUILD_INFO).write_text(json.dumps(state, indent=2) + "\n")
    print("sam_fast: " + "; ".join(f"{module}: {text}" for module, text in state.items()), flush=True)


def cuda_options() -> list[str]:
    """CMake's options for the CUDA module."""
    options = ["-DSAM_FAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={NVCC}"]
    architectures = os.environ.get("CMAKE_CUDA_ARCHITECTURES") or ";".join(
        map(from_torch_notation, torch_architectures())
    )
    return options + ([f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"] if architectures else [])


def torch_architectures() -> list[str]:
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()


def from_torch_notation(architecture: str) -> str:
    """``9.0+PTX`` is ``90`` in CMake's notation (machine code and PTX), ``9.0a`` is ``90a-real`` (machine code)."""
    number, plus, _ = architecture.partition("+")
    if not re.fullmatch(r"\d+\.\d[a-z]?", number):
        raise SystemExit(f"sam_fast: TORCH_CUDA_ARCH_LIST names {architecture!r}: use numbers such as 8.0 or 9.0+PTX")
    return number.replace(".", "") + ("" if plus else "-real")


class BuildPy(build_py):
    """Notes what was built when there is nothing to compile, so that CMakeBuild does not run."""

    def run(self) -> None:
        super().run()
        if NATIVE == "0":
            # An editable install uses the source folder itself.
            note(ROOT / "sam_fast" if self.editable_mode else Path(self.build_lib) / "sam_fast", what_is_built())


class CMakeBuild(build_ext):
    """Builds every extension in one CMake run."""

    def run(self) -> None:
        if not self.extensions:
            return
        target = Path(self.get_ext_fullpath(self.extensions[0].name)).parent.resolve()
        target.mkdir(parents=True, exist_ok=True)
        state = what_is_built()
        for module in state:
            Path(self.get_ext_fullpath(module)).unlink(missing_ok=True)
        without_cuda = self.attempt(target, cuda_options(), CUDA) if NVCC else None
        if without_cuda:
            state["sam_fast._cuda"] = f"not built: with {NVCC}: {without_cuda}; SAM_FAST_CUDA=1 makes that an error"
        without_any = None if NVCC and not without_cuda else self.attempt(target, [], NATIVE)
        if without_any:
            state = dict.fromkeys(state, f"not built: {without_any}; SAM_FAST_NATIVE=1 makes that an error")
            self.leave_out()
        if without_any or without_cuda:
            print(f"sam_fast: WARNING: a build failed, and the package will be slower: {without_any or without_cuda}")
        note(target, state)

    def attempt(self, target: Path, options: list[str], wanted: str) -> str | None:
        """Builds with ``options``. Returns why that failed, or None; if ``wanted`` is "1", a failure is an error."""
        try:
            self.cmake(target, options)
        except (subprocess.CalledProcessError, FileNotFoundError, ImportError) as error:
            if wanted == "1":
                raise SystemExit(
                    f"sam_fast: building the native modules failed: {reason(error)}\n"
                    "A C++17 compiler is needed. Without one, SAM_FAST_NATIVE=0 installs the package without native "
                    "kernels; SAM_FAST_CUDA=0 leaves the CUDA kernels out."
                ) from error
            return reason(error)
        return None

    def leave_out(self) -> None:
        """Makes a wheel for every platform, since there is nothing native in it after all."""
        self.extensions = self.distribution.ext_modules = []
        self.get_finalized_command("bdist_wheel").root_is_pure = True

    def cmake(self, target: Path, options: list[str]) -> None:
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
            *options,
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        for command in (configure, ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)]):
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
                lines = []
                for line in process.stdout or ():
                    print(line, end="", flush=True)
                    lines.append(line)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, "".join(lines))


def reason(error: Exception) -> str:
    """Why a build failed: what CMake or the compiler said first, in one line."""
    output = getattr(error, "output", None) or ""
    # The compiler's own words first: CMake only says that a test program did not compile.
    said = re.search(r"\b(?:error|fatal) *: ([^\n]+)", output)
    said = said or re.search(r"CMake Error[^\n]*\n((?:[ \t][^\n]*\n|\n)+)", output)
    if said is None:
        return str(error)
    return " ".join(said[1].split()).partition(". ")[0].rstrip(".")


def readme() -> str:
    """README.md for a package index. Links to files of this repository lead nowhere there: only their text stays."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)  # pictures
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]*\)", r"\1", text)


setup(
    ext_modules=[] if NATIVE == "0" else [Extension("sam_fast._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
