"""Compares two runs, or two versions of the package: per-benchmark ratios with noise bounds.

    python -m bench.compare BASE HEAD [--select "op or resnet18"] [--repeats 3] [--threshold 0.1]

BASE and HEAD are files saved with ``pytest bench --save``, git refs, or source trees. Of a ref or tree, the package is
built into build/compare, and this checkout's benchmarks measure the two in turn, ``--repeats`` times each, in processes
of their own. Every figure is taken relative to a baseline of the same rounds that does not come from the kernels
(PyTorch's copy, the reference, ...), so that a slow moment of the machine cancels.

Exits with 1 if something has become slower by more than ``--threshold`` beyond the noise, with 2 if nothing could be
compared.
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

from bench.machine import ROOT, first_line
from bench.peers import FOREACH, REFERENCE
from bench.records import TORCH_COPY, Run
from bench.training import SGD_TWICE

REGRESSION = "REGRESSION"
YARDSTICKS = (TORCH_COPY, REFERENCE, SGD_TWICE, FOREACH)
"""What a record's figures are relative to: the first of these that is among its contenders."""
SELECT = "operation and float32 or in_a_loop-161 or SGD-resnet18"


def figures(runs: Sequence[Run]) -> pd.DataFrame:
    """What is this project's, by record and contender: its cost relative to the record's yardstick (or in seconds,
    where it has none), the median over the runs; and the relative noise of that, within runs or between them, whichever
    is larger."""
    rows = []
    for record in (record for run in runs for record in run.records):
        yardstick = next((name for name in YARDSTICKS if name in record.rounds), None)
        for name in {record.target, "torch", "triton"} & record.rounds.keys() - set(YARDSTICKS):
            found = record.faster_than(name, yardstick) if yardstick else record.seconds(name)
            rows.append((f"{record.key} | {name}", found.value, found.noise))
    by_key = pd.DataFrame(rows, columns=["key", "cost", "noise"]).groupby("key")
    cost, within = by_key["cost"].median(), by_key["noise"].median()
    between = (by_key["cost"].max() - by_key["cost"].min()) / (2 * cost)
    return pd.DataFrame({"cost": cost, "noise": np.maximum(within, between) / np.sqrt(by_key.size())})


def changes(base: Sequence[Run], head: Sequence[Run], threshold: float) -> pd.DataFrame:
    """What both have: how much slower HEAD is than BASE (1.25 is 25 % slower), the noise (half the width of the
    interval, relative), and the verdict."""
    both = figures(base).add_suffix(" base").join(figures(head).add_suffix(" head"), how="inner")
    slower, noise = both["cost head"] / both["cost base"], np.hypot(both["noise base"], both["noise head"])
    worse, better = slower * (1 - noise) > 1 + threshold, slower * (1 + noise) < 1 / (1 + threshold)
    verdict = np.select([worse, better, noise > threshold], [REGRESSION, "faster", "unclear"], "same")
    return pd.DataFrame({"slower": slower, "noise": noise, "verdict": verdict})


def install(what: str, device: str) -> Path:
    """Build the package of a ref or source tree, and put this checkout's benchmarks beside it."""
    source, scratch = Path(what).resolve(), ROOT / "build" / "compare"
    if not source.is_dir():
        commit = first_line("git", "rev-parse", "--verify", "--quiet", f"{what}^{{commit}}")
        if not commit:
            raise SystemExit(f"{what!r} is neither a saved run, nor a source tree, nor a git ref")
        export(commit, source := scratch / f"{commit[:12]}-source")
    site = scratch / f"{source.name}-built"
    shutil.rmtree(site, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # The CUDA kernels take minutes to build for every GPU, and on the CPU nothing measures them.
    environment = {**os.environ, "SAM_FAST_CUDA": "0"} if device == "cpu" else None
    command = [*pip, "-c", str(ROOT / "constraints.txt"), "--target", str(site), str(source)]
    subprocess.run(command, check=True, env=environment)
    shutil.copytree(ROOT / "bench", site / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    return site


def export(commit: str, folder: Path) -> None:
    """A commit's files."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "checkout", "--quiet", "--detach", commit], cwd=folder, check=True)


IMPORTED = "import sam_fast; assert sam_fast.__file__.startswith({!r}), sam_fast.__file__"
"""Python finds the package that is meant."""


def measured(site: Path, number: int, options: Sequence[str]) -> Run:
    """One run of the selected benchmarks with the package that is in ``site``."""
    saved, path = site / f"run-{number}.json", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    script = f"{IMPORTED.format(str(site))}; import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    pytest = ["-q", "--benchmark-only", "-p", "no:cacheprovider", "--rootdir", str(site), str(site / "bench")]
    command = [sys.executable, "-c", script, *pytest, "--save", str(saved), *options]
    done = subprocess.run(command, cwd=site, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the benchmarks failed in {site}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return Run.load(saved)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("base", help="a saved run, a git ref or a source tree")
    add("head", help="what is compared with it, of the same kinds")
    add("--select", default=SELECT, help="the benchmarks to run, as pytest's -k (default: %(default)s)")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    add("--repeats", type=int, default=3, help="runs of each version (default: 3)")
    slowdown = "the slowdown that counts, beyond the noise (default: 0.1, 10 %%)"
    add("--threshold", type=float, default=0.1, help=slowdown)
    arguments = parser.parse_args(argv)
    both = [arguments.base, arguments.head]
    files = [Path(side).is_file() for side in both]
    if all(files):
        sides = [[Run.load(Path(side))] for side in both]
    elif any(files):
        parser.error("BASE and HEAD must both be saved runs, or neither")
    else:
        sites = [install(side, arguments.device) for side in both]
        if sites[0] == sites[1]:
            parser.error("BASE and HEAD are the same commit")
        options = ["-k", arguments.select, "--device", arguments.device]
        runs = [[measured(site, number, options) for site in sites] for number in range(arguments.repeats)]
        sides = list(zip(*runs, strict=True))
    found = changes(*sides, arguments.threshold)
    if found.empty:
        print("the two have no benchmark in common")
        return 2
    print("HEAD's time over BASE's, each relative to a baseline of the same rounds;", *map(len, sides), "runs")
    width = max(map(len, found.index))
    for name, slower, noise, verdict in found.itertuples():
        print(f"{name:{width}s}  {slower:6.3f} ± {100 * noise:4.1f} %  {verdict}")
    worse = (found["verdict"] == REGRESSION).sum()
    print(f"{worse} of {len(found)} slower by more than {100 * arguments.threshold:.0f} % beyond the noise")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
