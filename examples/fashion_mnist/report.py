"""The table, what it says, the picture and the file of results: of the runs that are finished, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import ttest_1samp
from tabulate import tabulate

from .train import NOISE, ROWS, Run

COLUMNS = {
    "accuracy": ("accuracy, %", 100, ".1f"),
    "noisy": (f"noisy, %\n(sd {NOISE:g})", 100, ".1f"),
    "sharpness": ("sharpness", 1, ".3f"),
    "seconds": ("seconds", 1, ".1f"),
}
"""A column's heading, factor and format."""


def values(runs: Sequence[Run], row: str, column: str) -> dict[int, float]:
    """A row's figures by seed."""
    return {run.seed: getattr(run, column) for run in runs if run.row == row}


def spread(figures: Sequence[float], shown: str) -> str:
    """Mean ± standard deviation; of one figure the figure."""
    return f"{np.mean(figures):{shown}}" + (f" ± {np.std(figures, ddof=1):{shown}}" if len(figures) > 1 else "")


def table(runs: Sequence[Run]) -> str:
    """Mean ± standard deviation over each row's seeds."""
    lines = []
    for name, row in ROWS.items():
        if seeds := values(runs, name, "seed"):
            cells = [
                spread([factor * v for v in values(runs, name, c).values()], shown)
                for c, (_, factor, shown) in COLUMNS.items()
            ]
            lines.append([row.title, *cells, len(seeds)])
    headings = ["trained with", *(heading for heading, _, _ in COLUMNS.values()), "seeds"]
    return tabulate(lines, headings, disable_numparse=True)


def conclusion(runs: Sequence[Run]) -> str:
    """Each row against SGD on the seeds that both have."""
    lines = []
    for name, row in list(ROWS.items())[1:]:
        seeds = values(runs, name, "seed").keys() & values(runs, "sgd", "seed").keys()
        if seeds:
            own, sgd = ({c: np.array([values(runs, n, c)[s] for s in seeds]) for c in COLUMNS} for n in (name, "sgd"))
            lines.append(
                f"{row.title}, against SGD on {len(seeds)} seed(s):\n"
                f"  accuracy {verdict(100 * (own['accuracy'] - sgd['accuracy']))}, "
                f"on noisy images {verdict(100 * (own['noisy'] - sgd['noisy']))}, "
                f"{np.mean(own['sharpness'] / sgd['sharpness']):.2f} times the sharpness, "
                f"{np.mean(own['seconds'] / sgd['seconds']):.2f} times the seconds"
            )
    return "\n".join(lines)


def verdict(points: np.ndarray) -> str:
    """A mean difference and its standard error, and whether a t-test finds one (at 5 %)."""
    if len(points) == 1:
        return f"{points.mean():+.1f} points"
    error = points.std(ddof=1) / len(points) ** 0.5
    clear = ttest_1samp(points, 0.0).pvalue < 0.05
    return f"{points.mean():+.1f} ± {error:.1f} points" + ("" if clear else " (no clear difference)")


def draw(runs: Sequence[Run], title: str, path: Path) -> None:
    """Test accuracy over seconds of training: a line is the mean over the seeds, a band the standard deviation."""
    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for (name, row), style in zip(ROWS.items(), ("--", ":", "-", "-."), strict=True):
        curves = np.array([*values(runs, name, "curve").values()])  # seeds, points, (seconds, accuracy)
        if len(curves):
            seconds, mean = curves.mean(axis=0).T
            sd = curves[..., 1].std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(mean)
            axes.plot(seconds, 100 * mean, style, linewidth=2, label=row.title)
            axes.fill_between(seconds, 100 * (mean - sd), 100 * (mean + sd), alpha=0.15)
    axes.set(title=title, xlabel="seconds of training", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def save(runs: Sequence[Run], settings: dict[str, Any], title: str, folder: Path) -> None:
    """Write results.json and accuracy.png."""
    content = {"title": title, "settings": settings, "runs": [asdict(run) for run in runs]}
    (folder / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw(runs, title, folder / "accuracy.png")
