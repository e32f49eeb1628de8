"""Shows that the suite notices: plants a slowdown of 25 % in one kernel, in a copy of the sources, and compares the
copy with the commit.

    python -m bench.planted [--repeats 3]

The kernel is the CPU's grad_norm: each thread, done with its chunks, waits for a quarter of the time that they took.
What was found becomes part of bench/results/cpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import subprocess
import sys

from bench import compare
from bench.machine import ROOT, commit_and_date
from bench.report import results

KERNEL = "csrc/cpu/grad_norm.cpp"
ADDED = {
    '#include "../sam_math.h"\n': "#include <chrono>\n",
    "parallel_chunks(b, threads, [&](Range range) {\n": "const auto begin = std::chrono::steady_clock::now();\n",
    ": sum_of_squares<T, false>(nullptr, g + c.begin, c.count, 0.0);\n    }\n": """\
    const auto took = std::chrono::steady_clock::now() - begin;
    while (std::chrono::steady_clock::now() - begin < took * 5 / 4) {
    }
""",
}
"""A text of the kernel's source -> what is added after it."""
SELECT = "test_op and resnet50 and float32 and not adaptive and (grad_norm or perturb or restore-)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", default="3")
    arguments = parser.parse_args()
    tree = ROOT / "build" / "compare" / "planted-source"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
    kernel = tree / KERNEL
    text = kernel.read_text()
    for place, added in ADDED.items():
        if text.count(place) != 1:
            raise SystemExit(f"{KERNEL} is no longer what bench/planted.py expects: adapt ADDED")
        text = text.replace(place, place + added)
    kernel.write_text(text)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = compare.main(["HEAD", str(tree), "--select", SELECT, "--repeats", arguments.repeats])
    print(output.getvalue())
    lines = [line for line in output.getvalue().splitlines() if "| cpu " in line]
    blamed = [line for line in lines if line.endswith("REGRESSION")]
    caught = code == 1 and len(blamed) == 1 and "grad_norm" in blamed[0]
    run = results(ROOT, "cpu")
    if run is not None:
        found = "; ".join(" ".join(line.replace("|", ",").split()) for line in lines)
        run.agreement["planted"] = {
            "caught": caught,
            "found": found,
            "output": output.getvalue().splitlines(),
            **commit_and_date(),
        }
        run.save(ROOT / "bench" / "results" / "cpu.json")
    print("caught" if caught else "NOT caught: either grad_norm is not blamed, or something else is")
    return 0 if caught else 1


if __name__ == "__main__":
    sys.exit(main())
