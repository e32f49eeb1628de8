"""Sanitizers are only worth something if they catch mistakes: some are planted in the CPU's and the emulated CUDA
kernels, and must be found.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
COMPILED_WITH = {"tsan": "thread", "asan": "address"}

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(shutil.which("setarch") is None, reason="needs setarch (util-linux)"),
]


def sanitizer_library(name: str) -> str | None:
    done = (
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=False)
        if shutil.which("g++")
        else None
    )
    path = done.stdout.strip() if done is not None else ""
    return path if os.path.isabs(path) else None


def run_kernel_tests(
    sanitizer: str, select: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The kernel tests that ``select`` picks, under a sanitizer. As `make sanitize` runs them all."""
    options = {
        "tsan": {"TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1"},
        "asan": {"ASAN_OPTIONS": "detect_leaks=0"},
    }[sanitizer]
    # UBSan's library brings libstdc++, whose exceptions AddressSanitizer wants to see from the start.
    libraries = [
        sanitizer_library(name) or "" for name in ([sanitizer, "ubsan"] if sanitizer == "asan" else [sanitizer])
    ]
    # Without randomized addresses: ThreadSanitizer needs certain ranges.
    command = [
        "setarch",
        "-R",
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "-q",
        *arguments,
        "kernels",
        "-k",
        select,
    ]
    env = {**os.environ, **options, "LD_PRELOAD": " ".join(libraries), **environment}
    return subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(autouse=True)
def _can_be_built(sanitizer: str) -> None:
    pytest.importorskip("pybind11")
    if sanitizer_library(sanitizer) is None:
        pytest.skip(f"needs g++ with lib{sanitizer}")


def broken_sources(tmp_path: Path, file: str, original: str, broken: str) -> Path:
    """A copy of csrc with one text replaced."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = (csrc / file).read_text()
    assert source.count(original) == 1
    (csrc / file).write_text(source.replace(original, broken))
    return csrc


@pytest.mark.guarantee(id="sanitizers")
@pytest.mark.parametrize(
    ("sanitizer", "file", "original", "broken", "report"),
    [
        ("tsan", "cuda/reduce.h", "  __syncthreads();\n", "", "data race"),
        (
            "asan",
            "cuda/format.h",
            "    part(Single<Bits>{}, whole, count);\n",
            "    part(Single<Bits>{}, whole, count + 1);\n",
            "heap-buffer-overflow",
        ),
    ],
    ids=["missing __syncthreads", "tail one element too long"],
)
def test_a_planted_bug_in_the_cuda_kernels_is_caught(tmp_path, sanitizer, file, original, broken, report):
    spec = importlib.util.spec_from_file_location("cuda_emulation_build", TESTS / "cuda_emulation" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    emulation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulation)
    module = emulation.build(
        tmp_path / "_cuda.so", COMPILED_WITH[sanitizer], broken_sources(tmp_path, file, original, broken), optimize=0
    )
    done = run_kernel_tests(
        sanitizer,
        "test_one_tensor and (1009 or 100003) and float32",
        *("-p", "cuda_emulation.plugin"),
        SAM_FAST_EMULATED_CUDA=str(module),
        SAM_FAST_TEST_BACKENDS="cuda",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode != 0
    assert report in done.stdout + done.stderr


@pytest.mark.guarantee(id="sanitizers")
@pytest.mark.parametrize(
    ("sanitizer", "file", "original", "broken", "report"),
    [
        # The last chunk of one thread's share is also the first of the next one's: both write the same numbers, and no
        # other test can tell.
        (
            "tsan",
            "cpu/parallel.h",
            "return {first_at(thread),",
            "return {thread > 0 ? first_at(thread) - 1 : 0,",
            "data race",
        ),
        (
            "asan",
            "cpu/perturb.cpp",
            "random.at(i), First{n - i});",
            "random.at(i));",
            "heap-buffer-overflow",
        ),
    ],
    ids=["threads that share a chunk", "a vector where there are too few elements"],
)
def test_a_planted_bug_in_the_cpu_kernels_is_caught(tmp_path, sanitizer, file, original, broken, report):
    package = tmp_path / "package"
    shutil.copytree(ROOT / "sam_fast", package / "sam_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "sam_fast" / "kernels").symlink_to(ROOT / "kernels")
    broken_sources(package, file, original, broken)
    shutil.copy(ROOT / "CMakeLists.txt", package)
    configure = [
        "cmake",
        "-S",
        str(package),
        "-B",
        str(tmp_path / "build"),
        f"-DSAM_FAST_SANITIZE={COMPILED_WITH[sanitizer]}",
    ]
    pybind11_dir = importlib.import_module("pybind11").get_cmake_dir()
    configure += [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11_dir}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package / 'sam_fast'}",
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        ["cmake", "--build", str(tmp_path / "build"), "--parallel", "2"], check=True, stdout=subprocess.DEVNULL
    )
    done = run_kernel_tests(
        sanitizer,
        "test_one_tensor and (1009 or 100003) and float32 and baseline",
        PYTHONPATH=str(package),
        SAM_FAST_EXPECT_SANITIZER=COMPILED_WITH[sanitizer],
        SAM_FAST_TEST_BACKENDS="cpu",
        OMP_NUM_THREADS="3",
    )
    assert done.returncode != 0
    assert report in done.stdout + done.stderr
