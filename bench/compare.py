"""Compares two runs, or two versions of the package: per-benchmark ratios with noise bounds.

    python -m bench.compare BASE HEAD [--select "op or resnet18"] [--repeats 3]

BASE and HEAD are files saved with ``pytest bench --save``, or else git refs or source trees, which are built for the
CPU into build/compare. This checkout's benchmarks measure the two in turn, ``--repeats`` times each, in processes of
their own. Every figure is taken relative to a baseline of the same rounds that does not come from the kernels
(PyTorch's copy, the reference, ...), so that a slow moment of the machine cancels.

Exits with 1 if something has become slower by more than 10 % beyond the noise, with 2 if nothing could be compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bench.contenders import FOREACH, REFERENCE
from bench.figures import figures
from bench.records import ROOT, TORCH_COPY, Record, Run, output
from bench.training import SGD_TWICE

REGRESSION = "REGRESSION"
YARDSTICKS = (TORCH_COPY, REFERENCE, SGD_TWICE, FOREACH)
"""What a record's figures are relative to: the first of these that is among its contenders."""
THRESHOLD = 0.1
"""The slowdown that counts."""
SELECT = "operation and float32 or in_a_loop-161 or SGD-resnet18"


def yardstick_of(record: Record) -> str | None:
    return next((name for name in YARDSTICKS if name in record.rounds), None)


def costs(runs: Sequence[Run]) -> pd.DataFrame:
    """What is this project's, by record and contender: the median over the runs of its cost relative to the yardstick,
    and the relative noise of that, within runs or between them, whichever is larger."""
    found = pd.concat([figures(run, yardstick_of) for run in runs])
    found["within"] = (found["high"] - found["low"]) / (2 * found["ratio"])
    ours = (found["contender"] == found["target"]) | found["contender"].isin(["torch", "triton"])
    found = found[ours & ~found["contender"].isin(YARDSTICKS)]
    by_key = found.groupby(["group", "case", "contender", "yardstick"], sort=False, dropna=False)
    ratio = by_key["ratio"]
    cost, between = ratio.median(), (ratio.max() - ratio.min()) / (2 * ratio.median())
    noise = np.maximum(by_key["within"].median(), between) / np.sqrt(by_key.size())
    return pd.DataFrame({"cost": cost, "noise": noise})


def changes(base: Sequence[Run], head: Sequence[Run]) -> pd.DataFrame:
    """What both have: how much slower HEAD is than BASE (1.25 is 25 % slower), the noise (half the width of the
    interval, relative), and the verdict."""
    both = costs(base).add_suffix(" base").join(costs(head).add_suffix(" head"), how="inner")
    slower, noise = both["cost head"] / both["cost base"], np.hypot(both["noise base"], both["noise head"])
    worse, better = slower * (1 - noise) > 1 + THRESHOLD, slower * (1 + noise) < 1 / (1 + THRESHOLD)
    verdict = np.select([worse, better, noise > THRESHOLD], [REGRESSION, "faster", "unclear"], "same")
    return pd.DataFrame({"slower": slower, "noise": noise, "verdict": verdict})


def apart(run: Run, again: Run) -> dict[str, float]:
    """How far the two runs' ratios to the reference are apart, by record, relative to the smaller."""
    slower = changes([run], [again])["slower"]
    relative = np.maximum(slower, 1 / slower) - 1
    return {f"{group}, {case}": round(x, 4) for (group, case, _, base), x in relative.items() if base == REFERENCE}


def install(version: str, site: Path) -> Path:
    """Build the package of a ref or source tree, and put this checkout's benchmarks beside it."""
    commit = output("git", "rev-parse", "--verify", "--quiet", f"{version}^{{commit}}")
    if not commit and not Path(version).is_dir():
        raise SystemExit(
            f"{version!r} is neither a source tree nor a git ref; and saved runs are compared with each other"
        )
    source = str(Path(version).resolve()) if Path(version).is_dir() else f"git+{ROOT.as_uri()}@{commit}"
    shutil.rmtree(site, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "-c", str(ROOT / "constraints.txt")]
    # The CUDA kernels take minutes to build for every GPU, and on the CPU nothing measures them.
    subprocess.run([*pip, "--target", str(site), source], check=True, env={**os.environ, "SAM_FAST_CUDA": "0"})
    shutil.copytree(ROOT / "bench", site / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    return site


def measured(site: Path, select: str) -> Run:
    """One run of the selected benchmarks, in the folder where ``python -m`` finds the package that is meant first."""
    pytest = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-only", "--rootdir", ".", "-k", select]
    done = subprocess.run([*pytest, "--save", "run.json"], cwd=site, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the benchmarks failed in {site}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return Run.load(site / "run.json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("base", help="a saved run, a git ref or a source tree")
    add("head", help="what is compared with it, of the same kinds")
    add("--select", default=SELECT, help="the benchmarks to run, as pytest's -k (default: %(default)s)")
    add("--repeats", type=int, default=3, help="runs of each version (default: 3)")
    arguments = parser.parse_args(argv)
    versions = [arguments.base, arguments.head]
    if all(Path(version).is_file() for version in versions):
        sides = [[Run.load(Path(version))] for version in versions]
    else:
        sites = [install(version, ROOT / "build" / "compare" / str(side)) for side, version in enumerate(versions)]
        runs = [[measured(site, arguments.select) for site in sites] for _ in range(arguments.repeats)]
        sides = list(zip(*runs, strict=True))
    found = changes(*sides)
    if found.empty:
        print("the two have no benchmark in common")
        return 2
    print("HEAD's time over BASE's, each relative to a baseline of the same rounds;", *map(len, sides), "runs")
    print(found.set_axis([" | ".join(key[:3]) for key in found.index]).round(3).to_string())
    worse = (found["verdict"] == REGRESSION).sum()
    print(f"{worse} of {len(found)} slower by more than {100 * THRESHOLD:.0f} % beyond the noise")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
