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
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import peers
from bench.machine import ROOT, first_line
from bench.records import COPY, TORCH_COPY, Estimate, Record, Run

YARDSTICKS = (TORCH_COPY, peers.REFERENCE, "2 x SGD", peers.FOREACH, "loop over buffers")
"""What a record's figures are relative to: the first of these that is among its contenders."""


@dataclass(frozen=True)
class Change:
    """How much slower HEAD is than BASE: 1.25 is 25 % slower."""

    key: str
    contender: str
    slower: float
    noise: float
    """Half the width of the interval, relative."""

    def verdict(self, threshold: float) -> str:
        if self.slower * (1 - self.noise) > 1 + threshold:
            return "REGRESSION"
        if self.slower * (1 + self.noise) < 1 / (1 + threshold):
            return "faster"
        return "unclear" if self.noise > threshold else "same"


def figures(record: Record) -> dict[str, Estimate]:
    """Cost of what is this project's, relative to the record's yardstick (or in seconds, where it has none)."""
    yardstick = next((name for name in YARDSTICKS if name in record.rounds), None)
    ours = [name for name in record.rounds if name == record.target or name in ("torch", "triton")]
    ours = [name for name in ours if name not in YARDSTICKS and name != COPY]
    if yardstick is None:
        return {name: record.seconds(name) for name in ours}
    return {name: record.faster_than(name, yardstick) for name in ours}


def changes(base: Sequence[Run], head: Sequence[Run]) -> list[Change]:
    """Compare the records that both have; several runs of a side give a better idea of its noise."""
    sides = []
    for runs in (base, head):
        found: dict[tuple[str, str], list[Estimate]] = {}
        for run in runs:
            for record in run.records:
                for name, estimate in figures(record).items():
                    found.setdefault((record.key, name), []).append(estimate)
        sides.append(found)
    out = []
    for key, estimates in sides[0].items():
        others = sides[1].get(key)
        if others:
            (a, noise_a), (b, noise_b) = _pooled(estimates), _pooled(others)
            out.append(Change(*key, slower=b / a, noise=math.hypot(noise_a, noise_b)))
    return out


def _pooled(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """The median over runs, and its relative noise: that within runs or that between them, whichever is larger."""
    values = [e.value for e in estimates]
    middle = statistics.median(values)
    within = statistics.median(e.noise for e in estimates) / math.sqrt(len(estimates))
    between = (max(values) - min(values)) / (2 * middle) / math.sqrt(len(values))
    return middle, max(within, between)


def table(found: Sequence[Change], threshold: float) -> list[str]:
    width = max(len(f"{c.key} | {c.contender}") for c in found)
    return [
        f"{f'{c.key} | {c.contender}':{width}s}  {c.slower:6.3f} ± {100 * c.noise:4.1f} %  {c.verdict(threshold)}"
        for c in found
    ]


# ---- Measuring two versions ------------------------------------------------------------------------------------------


def install(what: str) -> Path:
    """Build the package of a ref or source tree and put it, with this checkout's benchmarks, into a folder of its
    own.
    """
    source = Path(what)
    name = "tree-" + source.resolve().name
    scratch = ROOT / "build" / "compare"
    if not source.is_dir():
        commit = first_line("git", "rev-parse", "--verify", "--quiet", f"{what}^{{commit}}")
        if not commit:
            raise SystemExit(f"{what!r} is neither a saved run, nor a source tree, nor a git ref")
        name, source = commit[:12], scratch / f"{commit[:12]}-source"
        if not source.is_dir():
            scratch.mkdir(parents=True, exist_ok=True)
            archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
            source.mkdir()
            subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    site = scratch / name
    shutil.rmtree(site, ignore_errors=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    subprocess.run([*pip, "--no-deps", "--target", str(site), str(source)], check=True)
    shutil.copytree(ROOT / "bench", site / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    return site


def measured(site: Path, select: str, device: str, number: int, extra: Sequence[str]) -> Run:
    """One run of the selected benchmarks with the package that is in ``site``."""
    saved = site / f"run-{number}.json"
    options = ["-m", "pytest", "-q", "--benchmark-only", "-p", "no:cacheprovider", "--rootdir"]
    command = [sys.executable, *options, str(site), str(site / "bench"), "-k", select]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    probe = subprocess.run(
        [sys.executable, "-c", "import sam_fast; print(sam_fast.__file__)"],
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
    )
    if not probe.stdout.startswith(str(site)):
        raise SystemExit(
            f"the package under {site} is not the one that Python imports there: {probe.stdout}{probe.stderr}"
        )
    done = subprocess.run(
        [*command, "--device", device, "--save", str(saved), *extra],
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"the benchmarks failed in {site}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return Run.load(saved)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head")
    parser.add_argument(
        "--select",
        default="test_op and float32 or host_overhead and 161 or test_optimizer_step and SGD and resnet18",
        help="pytest -k",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threshold", type=float, default=0.1, help="what counts as a regression, beyond the noise")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    files = [Path(arguments.base).is_file(), Path(arguments.head).is_file()]
    if all(files):
        sides = [[Run.load(Path(arguments.base))], [Run.load(Path(arguments.head))]]
    elif any(files):
        parser.error("BASE and HEAD must both be saved runs, or neither")
    else:
        sites = [install(arguments.base), install(arguments.head)]
        if sites[0] == sites[1]:
            parser.error("BASE and HEAD are the same commit")
        sides = [[], []]
        for number in range(arguments.repeats):
            for side, site in zip(sides, sites, strict=True):
                side.append(
                    measured(site, arguments.select, arguments.device, number, ["--smoke"] if arguments.smoke else [])
                )
    found = changes(*sides)
    if not found:
        print("the two have no benchmark in common")
        return 2
    print(
        f"HEAD's time over BASE's, each relative to a baseline of the same rounds; {len(sides[0])} and {len(sides[1])} "
        "runs"
    )
    print("\n".join(table(found, arguments.threshold)))
    regressions = [c for c in found if c.verdict(arguments.threshold) == "REGRESSION"]
    print(f"{len(regressions)} of {len(found)} slower by more than {100 * arguments.threshold:.0f} % beyond the noise")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
