"""Compares saved runs of two versions of the package. Every figure is taken relative to a baseline of the same rounds
that does not come from the kernels (PyTorch's copy, the reference, ...), so that a slow moment of the machine cancels.
Exits with 1 if something has become slower by more than 10 % beyond the noise, with 2 if nothing could be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bench.contenders import FOREACH, REFERENCE
from bench.figures import figures
from bench.records import TORCH_COPY, Record, Run
from bench.training import SGD_TWICE

REGRESSION = "REGRESSION"
YARDSTICKS = (TORCH_COPY, REFERENCE, SGD_TWICE, FOREACH)  # figures are relative to the first that was measured
THRESHOLD = 0.1  # the slowdown that counts


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


def apart(run: Run, again: Run) -> pd.Series:
    """How far the two runs' ratios to the reference are apart, by record, relative to the smaller."""
    slower = changes([run], [again])["slower"].xs(REFERENCE, level="yardstick")
    slower.index = [f"{group}, {case}" for group, case, _ in slower.index]
    return np.maximum(slower, 1 / slower) - 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    for side in ("--base", "--head"):
        parser.add_argument(side, nargs="+", type=Path, required=True, help="files that `pytest bench --save` wrote")
    arguments = parser.parse_args(argv)
    base, head = ([Run.load(path) for path in paths] for paths in (arguments.base, arguments.head))
    found = changes(base, head)
    if found.empty:
        print("the two have no benchmark in common")
        return 2
    print("HEAD's time over BASE's, each relative to a baseline of the same rounds;", len(base), len(head), "runs")
    print(found.set_axis([" | ".join(key[:3]) for key in found.index]).round(3).to_string())
    worse = (found["verdict"] == REGRESSION).sum()
    print(f"{worse} of {len(found)} slower by more than {100 * THRESHOLD:.0f} % beyond the noise")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
