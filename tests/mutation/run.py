"""Breaks the package on purpose, one way at a time, and shows that the tests notice. Not part of the test suite: it
takes minutes.

    python tests/mutation/run.py               # from an environment made by `make`; all of breakages_of_*.py
    python tests/mutation/run.py momentum      # those whose name contains a word, or whose file begins with it
    python tests/mutation/run.py --skip-whole  # does not run the tests on unbroken sources first

Each breakage is a text replaced in a copy of the sources; a text that is not there exactly once is an error, so that a
breakage never outlives the code it breaks. The native module of the copy is built again where a C++ source was broken.
Prints what was caught, and ends with an error if something was not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from breakage import Breakage
from breakages_of_kernels import OF_KERNELS
from breakages_of_optimizer import OF_OPTIMIZER

BREAKAGES = OF_KERNELS + OF_OPTIMIZER
ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "sam_fast",
    "kernels",
    "csrc",
    "tests",
    "bench",
    "CMakeLists.txt",
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "docs",
    "examples",
)


def copy_sources(target: Path) -> None:
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    (target / "sam_fast" / "kernels").symlink_to(target / "kernels")


def build_native(copy: Path, build: Path) -> None:
    """Incremental: only what was broken is compiled again.

    For one instruction set and with few optimisations: the source is the same for all.
    """
    import pybind11

    if not (build / "build.ninja").exists():
        cmake = copy / "CMakeLists.txt"
        text = (
            cmake.read_text()
            .replace('MATCHES "^(x86_64|', 'MATCHES "^(none|')
            .replace("INTERFACE -O3)", "INTERFACE -O1)")
        )
        # Named baseline, but with the fused multiply-add that PyTorch's own steps have here: the tests compare bits.
        cmake.write_text(text.replace("add_kernels(baseline)", "add_kernels(baseline -mavx2 -mf16c -mfma)"))
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DSAM_FAST_WERROR=OFF",
        ]
        target = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={copy / 'sam_fast'}"
        command = ["cmake", "-S", str(copy), "-B", str(build), "-G", "Ninja", target, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(build), "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)


def passes(copy: Path, tests: tuple[str, ...], *, show: bool = False) -> bool:
    """Whether the tests pass on the copy; ``show`` prints what failed.

    A crash of the interpreter counts as noticed, a test that could not be found does not.
    """
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=copy / "tests", env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    if show and done.returncode:
        print(done.stdout[-3000:], done.stderr[-1000:])
    if done.returncode in (0, 1) or done.returncode < 0:
        return done.returncode == 0
    raise SystemExit(f"the tests {' '.join(tests)} could not be run:\n{done.stdout}{done.stderr}")


def check(copy: Path, build: Path, breakage: Breakage) -> bool:
    """True if the tests notice it. The copy is whole again afterwards."""
    path = copy / breakage.file
    whole = path.read_text()
    if whole.count(breakage.original) != 1:
        raise SystemExit(
            f"{breakage.name}: {breakage.file} has the text {whole.count(breakage.original)} times, not "
            f"once:\n{breakage.original}"
        )
    path.write_text(whole.replace(breakage.original, breakage.broken))
    native = breakage.file.startswith("csrc")
    try:
        if native:
            build_native(copy, build)
        return not passes(copy, breakage.tests)
    finally:
        path.write_text(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="in the names of breakages, or at the beginning of their files' names")
    parser.add_argument("--skip-whole", action="store_true", help="do not run the tests on unbroken sources first")
    arguments = parser.parse_args()
    words = arguments.words
    chosen = [b for b in BREAKAGES if not words or any(word in b.name or b.file.startswith(word) for word in words)]
    if not chosen:
        parser.error(f"no breakage has {' or '.join(words)} in its name")
    with tempfile.TemporaryDirectory() as folder:
        copy, build = Path(folder) / "copy", Path(folder) / "build"
        copy.mkdir()
        copy_sources(copy)
        built = {path: path.read_bytes() for path in (copy / "sam_fast").glob("_cpu*.so")}
        if any(b.file.startswith("csrc") for b in chosen):
            build_native(copy, build)
            built = {path: path.read_bytes() for path in (copy / "sam_fast").glob("_cpu*.so")}
        every = tuple(sorted({test for b in chosen for test in b.tests}))
        if not arguments.skip_whole and not passes(copy, every, show=True):
            raise SystemExit("the tests fail on unbroken sources")
        caught = 0
        for breakage in chosen:
            begin = time.monotonic()
            noticed = check(copy, build, breakage)
            for path, content in built.items():  # the module of the unbroken sources; the build folder is out of date
                path.write_bytes(content)
            caught += noticed
            print(
                f"{'caught' if noticed else 'SURVIVED'}  {time.monotonic() - begin:4.0f} s  {breakage.name}", flush=True
            )
    print(f"{caught} / {len(chosen)} caught")
    sys.exit(caught != len(chosen))


if __name__ == "__main__":
    main()
