"""The report's pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench import peers
from bench.records import TORCH_COPY, Record, Run
from bench.shapes import MODELS
from bench.test_scaling import BY_ELEMENTS, BY_TENSORS
from bench.test_training import GRAPH, REFERENCE, SGD_TWICE

COLOURS = {"sam_fast": "#d62728", peers.REFERENCE: "#7f7f7f"}


def draw_all(run: Run, folder: Path) -> list[str]:
    """Draw what the run has figures for; returns the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in (
        ("step", steps),
        ("roofline", roofline),
        ("scaling", scaling),
        ("training", training),
        ("memory", memory),
    ):
        figure = draw(run)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})
            plt.close(figure)
            drawn.append(f"{name}.png")
    return drawn


def steps(run: Run) -> Any:
    """How many times faster the whole step is than each baseline, by model."""
    groups = [g for g in ("optimizer step, SGD", "optimizer step, AdamW") if run.find(g)]
    if not groups:
        return None
    figure, axes = plt.subplots(len(groups), 1, figsize=(9, 3.6 * len(groups)), layout="constrained", squeeze=False)
    for axis, group in zip(axes[:, 0], groups, strict=True):
        records = [r for name in MODELS if (r := run.get(group, name)) is not None]
        names = [b for b in records[0].baselines if all(b in r.rounds for r in records)]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            estimates = [r.faster_than(name) for r in records]
            middle = [e.value for e in estimates]
            bounds = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
            axis.bar(
                [x + i * width for x in range(len(records))],
                middle,
                width,
                yerr=bounds,
                label=name,
                error_kw={"lw": 0.8},
            )
        axis.set_xticks(
            [x + 0.4 - width / 2 for x in range(len(records))], [r.case for r in records], rotation=15, fontsize=8
        )
        axis.axhline(1, color="black", lw=0.8)
        axis.set(ylabel="times faster than", title=group)
        axis.legend(fontsize=7, ncols=3)
    return figure


def roofline(run: Run) -> Any:
    """Bandwidth of the bytes that must move, as a share of the streaming copy's."""
    records = [r for r in run.records if r.group.startswith("op ") and r.copy_rounds and r.case == "resnet50 float32"]
    records += [
        r for g in ("optimizer step, SGD", "optimizer step, AdamW") if (r := run.get(g, "resnet50")) is not None
    ]
    if not records:
        return None
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for x, record in enumerate(records):
        for name in record.rounds:
            rate, share = record.bandwidth(name), record.share_of_copy(name)
            if rate is None or share is None or name == TORCH_COPY:
                continue
            ours = name == record.target
            axis.plot(
                [x],
                [100 * share.value],
                "D" if ours else "o",
                color=COLOURS["sam_fast"] if ours else "#bbbbbb",
                ms=7 if ours else 4,
            )
            if ours:
                axis.annotate(
                    f"{rate / 1e9:.0f} GB/s",
                    (x, 100 * share.value),
                    textcoords="offset points",
                    xytext=(7, -3),
                    fontsize=7,
                )
    axis.axhline(100, color="black", lw=1, label="streaming copy in the same rounds")
    axis.plot([], [], "D", color=COLOURS["sam_fast"], label="sam_fast")
    axis.plot([], [], "o", color="#bbbbbb", label="baselines and the torch backend")
    axis.set_xticks(range(len(records)), [r.group.removeprefix("op ") for r in records], rotation=20, fontsize=8)
    axis.set(
        ylabel="% of the copy's bandwidth",
        title="Bytes that must move per second, resnet50 shapes, float32",
        ylim=(0, None),
    )
    axis.legend(fontsize=8)
    return figure


def scaling(run: Run) -> Any:
    """Log-log: cost against the number of parameters and of tensors, with the floor."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in run.records:
        match = re.fullmatch(r"optimizer step, scaling with the (.*), (\d+ threads?)", record.group)
        if match:
            found.setdefault((match[1], match[2]), []).append(record)
    if not found:
        return None
    rows = [g for g in (BY_ELEMENTS, BY_TENSORS) if any(k[0] == g for k in found)]
    columns = sorted({threads for _, threads in found})
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(5 * len(columns), 3.8 * len(rows)),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    for i, group in enumerate(rows):
        for j, threads in enumerate(columns):
            axis, records = axes[i][j], found.get((group, threads), [])
            xs = [r.elements if group == BY_ELEMENTS else r.facts["tensors"] for r in records]
            for name in records[0].rounds if records else ():
                axis.loglog(
                    xs, [1e3 * r.seconds(name).value for r in records], "o-", color=COLOURS.get(name), label=name, ms=4
                )
            axis.loglog(
                xs,
                [1e3 * (r.floor() or 0) for r in records],
                "--",
                color="black",
                lw=1,
                label="floor: bytes at the copy's bandwidth",
            )
            axis.set(title=f"whole step with SGD, {threads}", xlabel=group, ylabel="ms" if j == 0 else None)
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=7)
    return figure


def training(run: Run) -> Any:
    """A SAM iteration over twice SGD's."""
    records = run.find("training iteration")
    if not records:
        return None
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    names = [n for n in (REFERENCE, "sam_fast", GRAPH) if all(n in r.rounds for r in records)]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        estimates = [r.faster_than(name, SGD_TWICE) for r in records]
        bounds = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
        colour = COLOURS.get(name, COLOURS[peers.REFERENCE] if name == REFERENCE else "#1f77b4")
        axis.bar(
            [x + i * width for x in range(len(records))],
            [e.value for e in estimates],
            width,
            yerr=bounds,
            label=name,
            color=colour,
            error_kw={"lw": 0.8},
        )
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(records))], [r.case for r in records], fontsize=8)
    axis.set(ylabel="SAM's iteration / two of SGD's", title="Whole training iteration", ylim=(0.8, None))
    axis.legend(fontsize=8)
    return figure


def memory(run: Run) -> Any:
    """Peak memory of a training step."""
    if not run.memory:
        return None
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    names = [m.contender for m in run.memory]
    axis.barh(
        names,
        [m.bytes_peak / 1e6 for m in run.memory],
        color=[COLOURS["sam_fast"] if n.startswith("sam_fast") else "#999999" for n in names],
    )
    axis.invert_yaxis()
    axis.set(xlabel="MB", title=f"Peak memory of a training step, {run.memory[0].case}")
    return figure
