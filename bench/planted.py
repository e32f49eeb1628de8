"""Shows that the suite notices: plants a slowdown of 25 % in one kernel, in a copy of the sources, and compares the copy with the commit.

    python -m bench.planted [--repeats 3]

The kernel is the CPU's grad_norm; after its work each thread sums the first quarter of its chunks once more. What was found becomes part of
bench/results/cpu.json.
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
AFTER = """                                            : sum_of_squares<T, false>(nullptr, g + c.begin, c.count, 0.0);
    }
"""
PLANTED = """    volatile double again = 0.0;
    for (int64_t i = range.begin; i < range.begin + (range.end - range.begin) / 4; ++i) {
      const Chunk& c = a.chunks.data[i];
      const Bits* g = reinterpret_cast<const Bits*>(a.grads[c.row]);
      if (g != nullptr) again = sum_of_squares<T, false>(nullptr, g + c.begin, c.count, 0.0);
    }
    (void)again;
"""
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
    if text.count(AFTER) != 1:
        raise SystemExit(f"{KERNEL} is no longer what bench/planted.py expects: adapt AFTER and PLANTED")
    kernel.write_text(text.replace(AFTER, AFTER + PLANTED))
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
        run.agreement["planted"] = {"caught": caught, "found": found, "output": output.getvalue().splitlines(), **commit_and_date()}
        run.save(ROOT / "bench" / "results" / "cpu.json")
    print("caught" if caught else "NOT caught: either grad_norm is not blamed, or something else is")
    return 0 if caught else 1


if __name__ == "__main__":
    sys.exit(main())
