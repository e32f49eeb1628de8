"""The benchmarks notice: a slowdown of a quarter is planted in one kernel, and bench.compare blames that one alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compare

pytestmark = pytest.mark.nightly
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "compare"
SELECT = "operations and float32 and not adaptive"
RUNS = 3
KERNEL = "csrc/cpu/grad_norm.cpp"
ADDED = {
    '#include "../sam_math.h"\n': "#include <chrono>\n",
    "parallel_chunks(b, threads, [&](Range range) {\n": "const auto begin = std::chrono::steady_clock::now();\n",
    ": sum_of_squares<T, false>(nullptr, g + c.begin, c.count, left, 0.0);\n    }\n": """\
    const auto took = std::chrono::steady_clock::now() - begin;
    while (std::chrono::steady_clock::now() - begin < took * 5 / 4) {
    }
""",
}
"""A text of the kernel's source -> what is added after it: each thread, done with its chunks, waits for a quarter of
the time that they took."""


def slowed(tree: Path) -> None:
    source = (tree / KERNEL).read_text()
    for place, added in ADDED.items():
        assert source.count(place) == 1, f"{KERNEL} is no longer what this test expects: adapt ADDED"
        source = source.replace(place, place + added)
    (tree / KERNEL).write_text(source)


def built(tree: Path, site: Path) -> Path:
    """The package of a source tree, with the benchmarks beside it."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "-c", str(ROOT / "constraints.txt")]
    # The CUDA kernels take minutes to build, and on the CPU nothing measures them.
    subprocess.run([*pip, "--target", str(site), str(tree)], check=True, env={**os.environ, "SAM_FAST_CUDA": "0"})
    shutil.copytree(tree / "bench", site / "bench", ignore=shutil.ignore_patterns("results"))
    return site


def measured(site: Path, number: int) -> str:
    """The file with one run, made in the folder where ``python -m`` finds the package that is meant first."""
    pytest_bench = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-only", "--rootdir", ".", "-k", SELECT]
    done = subprocess.run(
        [*pytest_bench, "--save", f"{number}.json"], cwd=site, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return str(site / f"{number}.json")


def test_a_slower_kernel_is_blamed_and_nothing_else_is(capsys):
    shutil.rmtree(FOLDER, ignore_errors=True)
    trees = [FOLDER / "source", FOLDER / "planted-source"]
    for tree in trees:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
    slowed(trees[1])
    sites = [built(tree, FOLDER / name) for tree, name in zip(trees, ("base", "head"), strict=True)]
    # In turn, as the machine's speed changes over minutes.
    base, head = zip(*([measured(site, number) for site in sites] for number in range(RUNS)), strict=True)
    assert compare.main(["--base", *base, "--head", *head]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" |")[0] for line in lines if line.endswith("REGRESSION")] == ["grad_norm, operation"]
