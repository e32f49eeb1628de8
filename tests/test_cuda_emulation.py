"""What the emulation of the CUDA kernels (tests/cuda_emulation) shows beyond `make test-cuda`; each case builds it or
takes minutes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        not (shutil.which("g++") and shutil.which("nm")), reason="NOT CHECKED: needs g++ and nm to build the emulation"
    ),
]


def build(out: Path, csrc: Path = CSRC) -> Path:
    """The emulated module."""
    pytest.importorskip("pybind11")
    spec = importlib.util.spec_from_file_location("cuda_emulation_build", TESTS / "cuda_emulation" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Path(module.build(out, csrc=csrc))


def run(module: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "cuda_emulation.plugin",
        *arguments,
    ]
    env = {
        "SAM_FAST_EMULATED_CUDA": str(module),
        "SAM_FAST_TEST_BACKENDS": "cuda",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.run(
        command, cwd=TESTS, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=900
    )


def test_as_many_blocks_as_on_a_large_gpu(tmp_path):
    """An H100 runs 396 blocks of a kernel at once, or 660 where five fit on each of its 132 multiprocessors."""
    done = run(build(tmp_path / "_cuda.so"), "cuda_emulation/test_many_blocks.py", SAM_FAST_EMULATED_BLOCKS="660")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_shared_memory_that_a_block_has_not_written_is_noticed(tmp_path):
    """Only the first block writes the scales.

    Where shared memory is kept from block to block, the others read what it wrote, and all tests pass.
    """
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    source = csrc / "cuda" / "perturb.cu"
    line = "    scales[i] = perturb_scale"
    assert source.read_text().count(line) == 1
    source.write_text(source.read_text().replace(line, "    if (blockIdx.x == 0) scales[i] = perturb_scale"))
    module = build(tmp_path / "_cuda.so", csrc)
    selected = ("kernels/test_perturb.py", "-k", "test_one_tensor and 100003 and float32")
    kept, poisoned = run(module, *selected, SAM_FAST_EMULATED_SHARED="kept"), run(module, *selected)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    assert poisoned.returncode == 1, poisoned.stdout + poisoned.stderr
    assert "1 failed" in poisoned.stdout
