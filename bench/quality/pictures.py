"""The pictures of docs/quality.md and of the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.quality import plan
from bench.quality.contenders import CONTENDERS, TITLES
from bench.quality.tasks import SUBJECTS, TASKS

HIGHLIGHT, ORDINARY, GREY = "#d62728", "#1f77b4", "#7f7f7f"
GAIN = "test accuracy less SGD's, points"


def bounds(estimate: Any) -> list[list[float]]:
    return [[estimate.value - estimate.low], [estimate.high - estimate.value]]


def cost_picture(by_task: dict[str, list[Any]]) -> Any:
    """The gain of all contenders, sorted by their cost."""
    figure, axes = plt.subplots(len(by_task), 1, figsize=(11, 5 * len(by_task)), layout="constrained", squeeze=False)
    for axis, (task, found) in zip(axes[:, 0], by_task.items(), strict=True):
        shown = sorted((r for r in found if len(r.runs) > 2), key=lambda r: (r.cost, r.gain.value))
        for i, row in enumerate(shown):
            colour = HIGHLIGHT if row.contender in ("sgd", "sam") else ORDINARY if row.complete else GREY
            axis.errorbar(i, row.gain.value, yerr=bounds(row.gain), fmt="o", ms=5, lw=1.2, color=colour)
        axis.set_xticks(
            range(len(shown)), [f"{r.contender}\n{r.cost:.2f}" for r in shown], rotation=45, ha="right", fontsize=8
        )
        unfinished = "" if all(r.complete for r in shown) else "; grey: not all seeds yet"
        axis.set(ylabel=GAIN, title=f"task {task}, by passes (SGD = 1){unfinished}")
        axis.axhline(0, color="black", lw=0.6)
        axis.grid(alpha=0.3)
    return figure


def price_picture(contrasted: Sequence[Sequence[Any]]) -> Any:
    """Gain over passes of the README's rows."""
    size = (4.4 * len(TASKS), 4)
    figure, axes = plt.subplots(1, len(TASKS), figsize=size, layout="constrained", squeeze=False, sharey=True)
    styles = {"sgd": ("o", "#333333"), "sgd-2x": ("o", GREY), "sam": ("s", HIGHLIGHT)}
    others = iter(zip("D^v*", ("#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e"), strict=True))
    for axis, row_of_task in zip(axes[0], zip(*contrasted, strict=True), strict=False):
        for row in row_of_task:
            marker, colour = styles.get(row.contender) or styles.setdefault(row.contender, next(others))
            title = (
                TITLES[row.contender] if row.contender.startswith(("sgd", "sam")) else f"SAM, {TITLES[row.contender]}"
            )
            axis.errorbar(row.cost, row.gain.value, yerr=bounds(row.gain), fmt=marker, ms=7, color=colour, label=title)
        axis.set(xlabel="passes, SGD = 1", title=SUBJECTS[row_of_task[0].task])
        axis.axhline(0, color="black", lw=0.6)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(GAIN)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False
    )
    return figure


def tuning_picture(results: plan.Results) -> Any:
    names = [name for name in CONTENDERS if CONTENDERS[name].along]
    figure, axes = plt.subplots(3, 6, figsize=(15, 7), layout="constrained", sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        for task in TASKS:
            first = plan.seeds_of(task)[0]
            sgd = plan.chosen(task, "sgd", results)
            base = plan.accuracy(task, "sgd", sgd, first, results) if sgd else None
            radii = [tried for tried in plan.grids(task, name, results) if len({s.rho for s in tried}) > 1]
            points = [(s.rho, plan.accuracy(task, name, s, first, results)) for tried in radii for s in tried]
            done = [(rho, score - base) for rho, score in points if score is not None and base is not None]
            axis.plot([rho for rho, _ in done], [gain for _, gain in done], "o-", ms=3, label=f"task {task}")
        axis.set_xscale("log")
        axis.set_title(name, fontsize=9)
        axis.axhline(0, color="black", lw=0.6)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("rho")
    figure.supylabel("gain over SGD on the tuning seeds, points")
    return figure


def save(folder: Path, **figures: Any) -> None:
    """Write each figure as ``folder/NAME.png``."""
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)
