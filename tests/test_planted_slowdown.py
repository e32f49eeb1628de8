"""The benchmarks notice: a slowdown of a quarter is planted in one kernel, and bench.compare blames that one alone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bench import compare

pytestmark = pytest.mark.nightly
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


def test_a_slower_kernel_is_blamed_and_nothing_else_is(capsys):
    tree = compare.ROOT / "build" / "compare" / "planted-source"
    shutil.rmtree(tree, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(compare.ROOT), str(tree)], check=True)
    slowed(tree)
    select = "operations and float32 and not adaptive"
    assert compare.main(["HEAD", str(tree), "--select", select]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" |")[0] for line in lines if line.endswith("REGRESSION")] == ["grad_norm, operation"]
