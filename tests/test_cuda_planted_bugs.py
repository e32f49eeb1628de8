"""The emulated CUDA kernels are worth something only if they catch mistakes: two are planted, and the sanitizers must report them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def sanitizer_library(name: str) -> str | None:
    done = subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=False) if shutil.which("g++") else None
    path = done.stdout.strip() if done is not None else ""
    return path if os.path.isabs(path) else None


def run_kernel_tests(module: Path, sanitizer: str, select: str) -> subprocess.CompletedProcess[str]:
    """The kernel tests that ``select`` picks, on the emulated cuda backend, under a sanitizer. As `make sanitize` runs them all."""
    options = {"tsan": {"TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1"}, "asan": {"ASAN_OPTIONS": "detect_leaks=0"}}[sanitizer]
    # UBSan's library brings libstdc++, whose exceptions AddressSanitizer wants to see from the start.
    libraries = [sanitizer_library(name) or "" for name in ([sanitizer, "ubsan"] if sanitizer == "asan" else [sanitizer])]
    # Without randomized addresses: ThreadSanitizer needs certain ranges.
    command = ["setarch", "-R", sys.executable, "-m", "pytest", "-p", "cuda_emulation.plugin", "-p", "no:cacheprovider", "--capture=sys", "-q"]
    environment = {
        **os.environ,
        **options,
        "LD_PRELOAD": " ".join(libraries),
        "SAM_FAST_EMULATED_CUDA": str(module),
        "OMP_NUM_THREADS": "1",
        "SAM_FAST_TEST_BACKENDS": "cuda",
    }
    return subprocess.run([*command, "kernels", "-k", select], cwd=TESTS, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("setarch") is None, reason="needs setarch (util-linux)")
@pytest.mark.parametrize(
    ("sanitizer", "file", "right", "wrong", "report"),
    [
        ("tsan", "reduce.h", "  __syncthreads();\n", "", "data race"),
        ("asan", "perturb.cu", "      if (i < count) store<false>(w + i,", "      if (i <= count) store<false>(w + i,", "heap-buffer-overflow"),
    ],
    ids=["missing __syncthreads", "tail one element too long"],
)
def test_a_planted_bug_is_caught(tmp_path, sanitizer, file, right, wrong, report):
    if sanitizer_library(sanitizer) is None:
        pytest.skip(f"needs g++ with lib{sanitizer}")
    pytest.importorskip("pybind11")
    spec = importlib.util.spec_from_file_location("cuda_emulation_build", TESTS / "cuda_emulation" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    emulation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulation)

    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.CSRC, csrc)
    source = (csrc / "cuda" / file).read_text()
    assert source.count(right) == 1
    (csrc / "cuda" / file).write_text(source.replace(right, wrong))
    module = emulation.build(tmp_path / "_cuda.so", {"tsan": "thread", "asan": "address"}[sanitizer], csrc, optimize=0)
    done = run_kernel_tests(module, sanitizer, "test_one_tensor and (1009 or 100003) and float32")
    assert done.returncode != 0
    assert report in done.stdout + done.stderr
