"""What a run found: the figures of each training, their mean and spread over the seeds, the table and the JSON file."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

import sam_fast
from sam_fast import backends

from .landscape import Landscape
from .settings import BASES, OPTIMIZERS, Settings
from .train import Curves


@dataclass(frozen=True)
class Result:
    """One trained model: ``optimizer`` is a name of ``OPTIMIZERS``; accuracies and shares are 0 to 1, ``sharpness`` is
    in nats.

    ``noisy_accuracy`` has one figure per noise level of the settings; ``wrong_labels`` is the share of wrong training
    labels.
    """

    optimizer: str
    seed: int
    wrong_labels: float
    curves: Curves
    noisy_accuracy: list[float]
    sharpness: float
    landscape: Landscape

    @property
    def test_accuracy(self) -> float:
        """After the last epoch."""
        return self.curves.test_accuracy[-1]

    @property
    def seconds_per_epoch(self) -> float:
        """Mean wall time of an epoch's training, without the evaluation after it."""
        return statistics.fmean(self.curves.seconds)

    @property
    def optimizer_share(self) -> float:
        """Share of the training time spent in the optimizer's steps and zero_grad."""
        return sum(self.curves.optimizer_seconds) / sum(self.curves.seconds)


@dataclass(frozen=True)
class Column:
    """A column of the table: its name in the JSON file, its heading, the figure of a result, and how it is shown
    (factor, decimals).
    """

    key: str
    heading: str
    value: Callable[[Result], float]
    factor: float
    decimals: int


def columns(settings: Settings) -> list[Column]:
    """The table's columns, from left to right."""

    def noisy(index: int) -> Callable[[Result], float]:
        return lambda result: result.noisy_accuracy[index]

    return [
        Column("test_accuracy", "test\nacc. %", lambda result: result.test_accuracy, 100.0, 1),
        *(
            Column(f"accuracy_noise_{level:g}", f"noise\nsd {level:g}", noisy(index), 100.0, 1)
            for index, level in enumerate(settings.noise_levels)
        ),
        Column("sharpness", "sharp-\nness", lambda result: result.sharpness, 1.0, 3),
        Column("seconds_per_epoch", "seconds\n/ epoch", lambda result: result.seconds_per_epoch, 1.0, 2),
        Column("optimizer_share", "optim.\ntime %", lambda result: result.optimizer_share, 100.0, 1),
    ]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def by_optimizer(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each optimizer over the seeds, in the order they were trained in."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.optimizer, []).append(result)
    return grouped


def table(results: Sequence[Result], settings: Settings) -> str:
    """The table as text, 80 columns wide, with a line below that says what the figures are."""
    shown = columns(settings)
    rows = []
    for name, group in by_optimizer(results).items():
        row = [OPTIMIZERS[name].label]
        for column in shown:
            mean, spread = mean_and_spread([column.value(result) * column.factor for result in group])
            text = f"{mean:.{column.decimals}f}"
            row.append(f"{text} ±{spread:.{column.decimals}f}" if len(group) > 1 else text)
        rows.append(row)
    body = tabulate(
        rows,
        headers=["trained\nwith", *(column.heading for column in shown)],
        disable_numparse=True,
        stralign="right",
        colalign=("left",),
    )
    seeds = len(settings.seeds)
    note = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else f"seed {settings.seeds[0]} alone"
    ball = "adaptive (ASAM) ball" if settings.adaptive else "ball"
    return (
        f"{body}\n\n{note}\n"
        "noise sd: accuracy, in %, on test images with Gaussian noise of that standard deviation (1 = the full pixel "
        "range)\n"
        f"sharpness: mean loss increase along the gradient at the edge of the {ball} of radius {settings.rho:g}\n"
        "optim. time: share of the training time in the optimizer's steps and zero_grad"
    )


def as_json(results: Sequence[Result], settings: Settings, source: str, seconds: float) -> dict[str, Any]:
    """Every setting and figure, ready for ``json.dump``; ``seconds`` is the whole run's wall time."""
    chosen = asdict(settings)
    chosen["data"] = None if settings.data is None else str(settings.data)
    chosen["output"] = str(settings.output)
    chosen["threads"] = torch.get_num_threads()
    chosen["optimizer_options"] = {
        name: {
            "class": BASES[choice.base].cls,
            "sam": choice.sam,
            "lr": settings.lr_of(choice.base),
            **BASES[choice.base].options,
        }
        for name, choice in OPTIMIZERS.items()
        if name in settings.optimizers
    }
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for name, group in by_optimizer(results).items():
        summary[name] = {}
        for column in columns(settings):
            values = [column.value(result) for result in group]
            mean, spread = mean_and_spread(values)
            summary[name][column.key] = {"mean": mean, "standard_deviation": spread, "values": values}
    return {
        "environment": {
            "sam_fast": sam_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "backends": backends.available(),
        },
        "settings": chosen,
        "data_source": source,
        "total_seconds": seconds,
        "summary": summary,
        "runs": [asdict(result) for result in results],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as strict JSON (no NaN).

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
