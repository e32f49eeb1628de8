"""The picture: learning curves above, the loss around the solutions below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .report import Result, by_optimizer
from .settings import DATASETS, OPTIMIZERS, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stay apart in the common kinds of colour blindness; the dashes tell the curves apart in print.
_STYLES = {"sgd": ("#d55e00", "--"), "sam": ("#0072b2", "-"), "adamw": ("#cc79a7", ":"), "sam-adamw": ("#009e73", "-.")}


def draw(results: Sequence[Result], settings: Settings, path: Path) -> None:
    """Draw the results to a PNG at ``path``: lines are means, bands go from the lowest to the highest seed (and
    direction, in the landscape).

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(11.0, 8.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    groups = by_optimizer(results)
    for name, group in groups.items():
        epochs = np.arange(1, settings.epochs + 1)
        _line(axes[0, 0], name, epochs, np.array([result.curves.train_loss for result in group]))
        _line(axes[0, 1], name, epochs, 100 * np.array([result.curves.test_accuracy for result in group]))
        steps = np.array(group[0].landscape.steps)
        losses = np.concatenate([np.array(result.landscape.losses) for result in group])
        _line(axes[1, 0], name, steps, losses)
        _line(axes[1, 1], name, steps, losses - losses[:, [len(steps) // 2]])
    _describe(axes[0, 0], "Training loss", "epoch", "mean cross-entropy (nats)")
    _describe(axes[0, 1], "Test accuracy", "epoch", "accuracy (%)")
    direction = "step along a random filter-normalised direction"
    _describe(axes[1, 0], "Training loss around the solution", direction, "mean cross-entropy (nats)")
    _describe(axes[1, 1], "Its rise above the solution, close by", direction, "loss increase (nats)")
    figure.suptitle(_title(settings), fontsize=12)
    figure.savefig(path, format="png")


def _title(settings: Settings) -> str:
    noise = f", {settings.label_noise:.0%} of the labels randomised" if settings.label_noise else ""
    seeds = (
        f"{len(settings.seeds)} seeds: line = mean, band = lowest to highest"
        if len(settings.seeds) > 1
        else f"seed {settings.seeds[0]}"
    )
    ball = "adaptive, " if settings.adaptive else ""
    return (
        f"{DATASETS[settings.dataset].title}, {settings.train_size:,} training images{noise} ({ball}rho "
        f"{settings.rho:g}; {seeds})"
    )


def _line(axes: Axes, name: str, x: np.ndarray, values: np.ndarray) -> None:
    """The mean over the rows of ``values`` (rows, len(x)) as a line, their range as a band."""
    colour, dashes = _STYLES[name]
    axes.plot(x, values.mean(axis=0), color=colour, linestyle=dashes, linewidth=2.0, label=OPTIMIZERS[name].label)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)


def _describe(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.tick_params(labelsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=10)
