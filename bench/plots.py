"""The report's pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from bench.models import MODELS
from bench.peers import OURS, REFERENCE
from bench.records import Estimate, Record, Run
from bench.test_steps import BY_ELEMENTS, BY_TENSORS
from bench.test_training import ITERATION, SGD_ONCE, SGD_TWICE

COLOURS = {OURS: "#d62728", REFERENCE: "#7f7f7f", "SAM reference": "#7f7f7f"}


def draw_all(run: Run, folder: Path) -> list[str]:
    """Draw what the run has figures for; returns the pictures' names."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for draw in (step, scaling, training):
        figure = draw(run)
        if figure is not None:
            figure.savefig(folder / f"{draw.__name__}.png", dpi=100, metadata={"Software": None})
            plt.close(figure)
            drawn.append(draw.__name__)
    return drawn


def bars(axis: Any, estimates: dict[str, dict[str, Estimate]], **settings: Any) -> None:
    """Bars with intervals: case -> name -> estimate. Names that not every case has are left out."""
    frame = pd.DataFrame(estimates).T.dropna(axis="columns")
    value, low, high = (frame.map(lambda e, of=of: getattr(e, of)) for of in ("value", "low", "high"))
    errors = [[value[name] - low[name], high[name] - value[name]] for name in value]
    colours = {"color": [COLOURS[n] for n in value]} if COLOURS.keys() >= set(value) else {}
    value.plot.bar(ax=axis, yerr=errors, width=0.8, rot=12, fontsize=8, error_kw={"lw": 0.8}, **colours)
    axis.axhline(1, color="black", lw=0.8)
    axis.set(**settings)
    axis.legend(fontsize=7, ncols=3)


def step(run: Run) -> Any:
    """How many times faster the whole step is than each baseline, by model."""
    groups = [g for g in ("optimizer step, SGD", "optimizer step, AdamW") if run.find(g)]
    if not groups:
        return None
    figure, axes = plt.subplots(len(groups), 1, figsize=(9, 3.6 * len(groups)), layout="constrained", squeeze=False)
    for axis, group in zip(axes[:, 0], groups, strict=True):
        records = [r for r in run.find(group) if r.case in MODELS]
        ratios = {r.case: {name: r.faster_than(name) for name in r.baselines} for r in records}
        bars(axis, ratios, ylabel="times faster than", title=group)
    return figure


def scaling(run: Run) -> Any:
    """Log-log: cost against the number of parameters and of tensors, with the floor."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in run.records:
        if match := re.fullmatch(r"optimizer step, scaling with the (.*), (\d+ threads?)", record.group):
            found.setdefault((match[1], match[2]), []).append(record)
    rows, columns = [g for g in (BY_ELEMENTS, BY_TENSORS) if g in {k for k, _ in found}], sorted({t for _, t in found})
    if not found:
        return None
    size = (5 * len(columns), 3.8 * len(rows))
    figure, axes = plt.subplots(
        *map(len, (rows, columns)), figsize=size, layout="constrained", squeeze=False, sharey="row"
    )
    for (group, threads), records in found.items():
        axis = axes[rows.index(group)][columns.index(threads)]
        costs = {
            (r.elements if group == BY_ELEMENTS else r.facts["tensors"]): {
                **{name: 1e3 * r.seconds(name).value for name in r.rounds},
                "floor": 1e3 * floor if (floor := r.floor()) else float("nan"),
            }
            for r in records
        }
        frame = pd.DataFrame(costs).T.sort_index()
        frame.plot(ax=axis, loglog=True, style={"floor": ":"}, marker="o", ms=3, color={**COLOURS, "floor": "black"})
        axis.set(title=f"whole step with SGD, {threads}", xlabel=group, ylabel="ms")
        axis.grid(alpha=0.3, which="both")
    return figure


def training(run: Run) -> Any:
    """A SAM iteration over twice SGD's."""
    records = run.find(ITERATION)
    if not records:
        return None
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    names = [name for name in records[0].rounds if name not in (SGD_ONCE, SGD_TWICE)]
    costs = {r.case: {name: r.faster_than(name, SGD_TWICE) for name in names if name in r.rounds} for r in records}
    label, title = "SAM's iteration / two of SGD's", "Whole training iteration"
    bars(axis, costs, ylabel=label, title=title, ylim=(0.8, None))
    return figure
