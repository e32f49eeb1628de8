"""The table, what it says, the picture and the file of results: of the runs that are finished, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import sem, ttest_1samp
from tabulate import tabulate

from .train import NOISE, ROWS, Row, Run

COLUMNS = {
    "accuracy": ("accuracy, %", ".1f"),
    "noisy": (f"noisy, %\n(sd {NOISE:g})", ".1f"),
    "sharpness": ("sharpness", ".3f"),
    "seconds": ("seconds", ".1f"),
}
"""A column's heading and format."""


def values(runs: Sequence[Run], row: str, column: str) -> np.ndarray:
    """A row's figures, in the order of the seeds."""
    return np.array([getattr(run, column) for run in runs if run.row == row])


def spread(figures: np.ndarray, shown: str) -> str:
    """Mean ± standard deviation; of one figure the figure."""
    return f"{figures.mean():{shown}}" + (f" ± {figures.std(ddof=1):{shown}}" if len(figures) > 1 else "")


def table(runs: Sequence[Run], rows: Mapping[str, Row] = ROWS) -> str:
    """Mean ± standard deviation over each row's seeds."""
    lines = []
    for name, row in rows.items():
        if seeds := len(values(runs, name, "seed")):
            cells = [spread(values(runs, name, column), shown) for column, (_, shown) in COLUMNS.items()]
            lines.append([row.title, *cells, seeds])
    headings = ["trained with", *(heading for heading, _ in COLUMNS.values()), "seeds"]
    return tabulate(lines, headings, disable_numparse=True)


def conclusion(runs: Sequence[Run]) -> str:
    """Each row against SGD, which is trained first with each seed, on the row's seeds."""
    lines = []
    for name, row in list(ROWS.items())[1:]:
        own = {column: values(runs, name, column) for column in COLUMNS}
        if seeds := len(own["accuracy"]):
            sgd = {column: values(runs, "sgd", column)[:seeds] for column in COLUMNS}
            lines.append(
                f"{row.title}, against SGD on {seeds} seed(s):\n"
                f"  accuracy {verdict(own['accuracy'] - sgd['accuracy'])}, "
                f"on noisy images {verdict(own['noisy'] - sgd['noisy'])}, "
                f"{np.mean(own['sharpness'] / sgd['sharpness']):.2f} times the sharpness, "
                f"{np.mean(own['seconds'] / sgd['seconds']):.2f} times the seconds"
            )
    return "\n".join(lines)


def verdict(points: np.ndarray) -> str:
    """A mean difference and its standard error, and whether a t-test finds one (at 5 %)."""
    if len(points) == 1:
        return f"{points[0]:+.1f} points (one seed: not tested)"
    clear = ttest_1samp(points, 0.0).pvalue < 0.05
    return f"{points.mean():+.1f} ± {sem(points):.1f} points" + ("" if clear else " (no clear difference)")


def save(runs: Sequence[Run], settings: dict[str, Any], title: str, folder: Path) -> None:
    """Write results.json and accuracy.png."""
    content = {"title": title, "settings": settings, "runs": [asdict(run) for run in runs]}
    text = json.dumps(content, indent=1, allow_nan=False, default=str)
    (folder / "results.json").write_text(f"{text}\n", encoding="utf-8")
    draw(runs, title).savefig(folder / "accuracy.png")


def draw(runs: Sequence[Run], title: str) -> Figure:
    """Test accuracy over seconds of training: a line is the mean over the seeds, a band the standard deviation."""
    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for (name, row), style in zip(ROWS.items(), ("--", ":", "-", "-."), strict=True):
        curves = values(runs, name, "curve")  # seeds, points, (seconds, accuracy)
        if len(curves):
            seconds, mean = curves.mean(axis=0).T
            sd = curves[..., 1].std(axis=0, ddof=1) if len(curves) > 1 else 0.0
            axes.plot(seconds, mean, style, linewidth=2, label=row.title)
            axes.fill_between(seconds, mean - sd, mean + sd, alpha=0.15)
    axes.set(title=title, xlabel="seconds of training", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
