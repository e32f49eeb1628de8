"""The table, what it says, and the picture, all made from the runs that are finished."""

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import sem, ttest_1samp
from tabulate import tabulate

from .train import NOISE, ROWS, Row, Run

COLUMNS = {"accuracy, %": ".1f", f"noisy, %\n(sd {NOISE:g})": ".1f", "sharpness": ".3f", "seconds": ".1f"}


def figures(runs: list[Run], row: str) -> np.ndarray:
    """What the table shows of a row: an array (seeds, COLUMNS), in the order of the seeds."""
    return np.array([(run.accuracy, run.noisy, run.sharpness, run.seconds) for run in runs if run.row == row])


def spread(column: np.ndarray, shown: str) -> str:
    """Mean ± standard deviation; for a single figure just that."""
    return f"{column.mean():{shown}}" + (f" ± {column.std(ddof=1):{shown}}" if len(column) > 1 else "")


def table(runs: list[Run], rows: dict[str, Row]) -> str:
    """Mean ± standard deviation over each row's seeds; below it, where SGD was trained, the others against SGD."""
    sgd = figures(runs, "sgd")  # the first with each seed: it has all seeds that the others have
    lines, comparisons = [], []
    for name, row in rows.items():
        own = figures(runs, name)
        seeds = len(own)
        if seeds:
            lines.append([row.title, *map(spread, own.T, COLUMNS.values()), seeds])
        if seeds and len(sgd) and name != "sgd":
            accuracy, noisy = (own - sgd[:seeds]).T[:2]
            sharpness, seconds = (own / sgd[:seeds]).mean(axis=0)[2:]
            comparisons.append(
                f"{row.title}, against SGD on {seeds} seed(s):\n"
                f"  accuracy {verdict(accuracy)}, on noisy images {verdict(noisy)}, "
                f"{sharpness:.2f} times the sharpness, {seconds:.2f} times the seconds"
            )
    return "\n".join([tabulate(lines, ["trained with", *COLUMNS, "seeds"], disable_numparse=True), "", *comparisons])


def verdict(points: np.ndarray) -> str:
    """A mean difference and its standard error, and whether a t-test finds one (at 5 %)."""
    if len(points) == 1:
        return f"{points[0]:+.1f} points (one seed: not tested)"
    clear = ttest_1samp(points, 0.0).pvalue < 0.05
    return f"{points.mean():+.1f} ± {sem(points):.1f} points" + ("" if clear else " (no clear difference)")


def draw(runs: list[Run], title: str) -> Figure:
    """Test accuracy over seconds of training: a line is the mean over the seeds, a band the standard deviation."""
    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for (name, row), style in zip(ROWS.items(), ("--", ":", "-", "-."), strict=True):
        curves = np.array([run.curve for run in runs if run.row == name])  # seeds, points, (seconds, accuracy)
        if len(curves):
            seconds, mean = curves.mean(axis=0).T
            sd = curves[..., 1].std(axis=0, ddof=1) if len(curves) > 1 else 0.0
            axes.plot(seconds, mean, style, linewidth=2, label=row.title)
            axes.fill_between(seconds, mean - sd, mean + sd, alpha=0.15)
    axes.set(title=title, xlabel="seconds of training", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
