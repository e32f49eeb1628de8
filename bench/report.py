"""Makes docs/benchmarks.md, its picture and the README's table from the runs in bench/results/: cpu.json,
cpu-again.json (a second run of the same commit), cuda.json, and cpu-OTHER.json for other CPUs or threads.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from scipy.stats import gmean

from bench.compare import apart
from bench.contenders import BEST_PEERS, LARGE, LARGEST, MAKERS, MODELS, OURS, PEER_FOREACH, REFERENCE
from bench.figures import figures
from bench.processes import MEMORY, WEAK_SCALING
from bench.records import ROOT, Run
from bench.training import ASCENT, EVERY, ITERATION, NETWORKS, PRICE, SGD_ONCE, SGD_TWICE, UNPERTURBED
from bench.training import REFERENCE as SAM_REFERENCE

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
UNITS = {"x": 1.0, "%": 1e2, "ms": 1e3, "us": 1e6, "launches": 1.0}
OTHER = "Another run:"  # so begins the title of a section with a run beside the one in the README
BEGIN, END = "<!-- benchmarks: made by bench.report -->", "<!-- end of benchmarks -->"
RELATIVE = {ITERATION: SGD_TWICE, PRICE: SGD_ONCE, UNPERTURBED: SGD_ONCE, MEMORY: SGD_ONCE, WEAK_SCALING: "1 process"}
"""Groups whose tables say how much of this contender's cost each one's is; elsewhere: how many times faster we are."""
SECTIONS = {
    "Whole optimizer step": (
        "optimizer step, (SGD|AdamW)",
        "first_step and second_step, each with the gradients of a new backward pass. Times faster than each baseline. "
        "The bandwidth is given where the last level cache would hold at most a tenth of the bytes that move.",
    ),
    "Its halves": ("(first|second)_step, (SGD|AdamW)", "Of the same rounds."),
    "Operations": (".+, operation", "Bytes that must move, over the bandwidth measured in the same rounds."),
    "Host overhead": ("(first|second)_step, host time.*|import.*", "For tiny tensors, until the call returns."),
    "Scaling": ("optimizer step, scaling.*", "Whole step with SGD. Cases are elements in tensors."),
    "Weak scaling": (WEAK_SCALING, "Time over one process's, each with resnet18's parameters or a shard as large."),
    "Whole training iteration": (ITERATION, "Time over that of two iterations of SGD(fused=True)."),
    "Fewer passes": (f"{PRICE}|{UNPERTURBED}", "Time over that of SGD(fused=True)."),
    "Memory": (MEMORY, "Three training iterations, above what was there before the model."),
}
"""Title -> pattern of its groups, each of which has a table, and an explanation."""
FIRST, SECOND, STEP, ADAMW = "first_step, SGD", "second_step, SGD", "optimizer step, SGD", "optimizer step, AdamW"
PANELS = (STEP, ADAMW, ITERATION)  # groups that are in the picture
PICTURE = Path("benchmarks") / "ratios.png"
HEAD = """# Benchmarks

Made by `python -m bench.report` from `bench/results/`; do not edit. How to run and read them: `bench/README.md`.

Ratios are medians over rounds of the quotient within the round, with the 95 % interval of the median.

## Targets"""


@dataclass
class Result(Run):
    """A saved run, and the figures that are shown of it."""

    again: Run | None = None  # a second run of the same commit

    @cached_property
    def figures(self) -> pd.DataFrame:
        found = figures(self, lambda record: RELATIVE.get(record.group, record.target))
        found["cost"] = [cost(row.seconds, row.unit) for row in found.itertuples()]
        found["cell"] = [cell(row) for row in found.itertuples()]
        return found

    def find(self, column: str, group: str) -> pd.DataFrame:
        """A column of a group's figures: a row for each case, a column for each contender."""
        found = self.figures[self.figures["group"] == group]
        cases, contenders = found["case"].unique(), found["contender"].unique()
        return found.pivot(index="case", columns="contender", values=column).loc[cases, contenders]


Values = Callable[[Result], pd.Series]  # finds figures in a run, by case


def of(column: str, group: str, cases: Iterable[str], contenders: Iterable[str] = (OURS,)) -> Values:
    """The least figure of these contenders in each of these cases; none unless all cases and all contenders are there.
    A case may lack a contender that another has: not every one is measured everywhere."""

    def find(run: Result) -> pd.Series:
        found = run.find(column, group)
        if set(cases) <= set(found.index) and set(contenders) <= set(found.columns):
            return found.loc[list(cases), list(contenders)].min(axis="columns").dropna()
        return pd.Series(dtype=float)

    return find


def between_runs(run: Result) -> pd.Series:
    """How far the ratios of a second run are from this one's."""
    return apart(run, run.again) if run.again else pd.Series(dtype=float)


BIG = [name for name in LARGE if name != "resnet50"]  # 80M parameters and more
MODELS_ADAMW, LARGE_ADAMW = ([name for name in names if name != LARGEST] for names in (MODELS, LARGE))
THAN, WHOLE = "times faster than the reference", "whole step with"
HOST = "host time of first_step for 161 parameters under 60 us, in a loop of its own"
sgd_share, adamw_share = of("share", STEP, LARGE), of("share", ADAMW, LARGE_ADAMW)
first_step, sgd_step = (of("ratio", group, MODELS, [REFERENCE]) for group in (FIRST, STEP))
adamw_step = of("ratio", ADAMW, MODELS_ADAMW, [REFERENCE])
than_peers = of("ratio", STEP, MODELS, BEST_PEERS)
ascent, every = (of("ratio", PRICE, ["ConvNet, batch 128"], [name]) for name in (ASCENT, EVERY))
no_slower = of("low", UNPERTURBED, ["resnet18", "resnet50"])  # beyond the noise: the interval's lower end
host_time = of("seconds", "first_step, host time, in a loop", ["161 x 8"])
imported = of("seconds", "import sam_fast after import torch", ["fresh process"])
first_on_50, step_on_50 = (of("ratio", group, ["resnet50"], [REFERENCE]) for group in (FIRST, STEP))
foreach = of("ratio", FIRST, ["resnet50"], [PEER_FOREACH])

Target = tuple[str, str, str, Values]
"""What is wanted, the bound, which of the figures must keep it ("least", "most", or their geometric "mean")."""
ON_THE_CPU: list[Target] = [
    (f"first_step at least 3.5 {THAN} on every set", ">= 3.5 x", "least", first_step),
    ("first_step at least 4.5 times faster, geometric mean", ">= 4.5 x", "mean", first_step),
    (f"{WHOLE} SGD at least 4 {THAN}, geometric mean", ">= 4 x", "mean", sgd_step),
    (f"{WHOLE} SGD at least 3 times faster on every set", ">= 3 x", "least", sgd_step),
    (f"{WHOLE} SGD at least twice as fast as the best peer, geometric mean", ">= 2 x", "mean", than_peers),
    ("the same on every set", ">= 2 x", "least", than_peers),
    (f"{WHOLE} AdamW at least 3 {THAN}, geometric mean", ">= 3 x", "mean", adamw_step),
    ("the same on every set", ">= 3 x", "least", adamw_step),
    ("SGD: at least 85 % of the measured bandwidth from 25M parameters on", ">= 85 %", "least", sgd_share),
    ("AdamW: the same", ">= 85 %", "least", adamw_share),
    ("SAM with ascent=1/4 at most 1.35 of SGD's time, batches of 128", "<= 1.35 x", "most", ascent),
    ("SAM with every=4 at most 1.30 of SGD's time, batches of 128", "<= 1.30 x", "most", every),
    ("a step that does not perturb no slower than SGD(fused=True), beyond the noise", "<= 1 x", "most", no_slower),
    (HOST, "<= 60 us", "mean", host_time),
    ("import adds under 50 ms", "<= 50 ms", "mean", imported),
    ("two runs agree: every ratio to the reference within 15 %", "<= 15 %", "most", between_runs),
]
ON_A_GPU: list[Target] = [
    (f"GPU: first_step on resnet50 at least 10 {THAN}", ">= 10 x", "mean", first_on_50),
    ("GPU: the same at least 3 times faster than pytorch_optimizer's foreach SAM", ">= 3 x", "mean", foreach),
    (f"GPU: whole step on resnet50 at least 10 {THAN}", ">= 10 x", "mean", step_on_50),
    ("GPU: first_step at 90 % of a copy's rate from 80M parameters on", ">= 90 %", "least", of("share", FIRST, BIG)),
    ("GPU: whole step at 90 % of the same", ">= 90 %", "least", of("share", STEP, BIG)),
    (f"GPU: {HOST}", "<= 60 us", "mean", host_time),
    ("GPU: second_step is one launch", "<= 1 launches", "mean", of("launches", SECOND, ["resnet50"])),
]


def judged(wanted: Sequence[Target], run: Result) -> list[dict[str, str]]:
    """Every target: what was wanted, what was measured (empty where nothing was), and whether it is met."""
    rows = []
    for target, bound, which, find in wanted:
        sign, limit, unit = bound.split()
        measured, verdict = "", NOT_MEASURED
        if not (values := UNITS[unit] * find(run)).empty:
            where = {"least": values.idxmin(), "most": values.idxmax()}.get(which)
            value = values[where] if where else gmean(values)
            measured = f"{value:.2f}x" if unit == "x" else f"{value:.0f} {unit}"
            measured += f", {which}: {where}" if where else ""
            verdict = MET if (value >= float(limit) if sign == ">=" else value <= float(limit)) else NOT_MET
        rows.append({"target": target, "measured": measured, "": verdict})
    return rows


def results(root: Path) -> tuple[Result, Result | None, list[Result]]:
    """The runs in bench/results: the CPU's, the GPU's, and those on other CPUs. Raises KeyError without cpu.json."""
    folder = root / "bench" / "results"
    runs = {path.stem: Result.load(path) for path in sorted([*folder.glob("cpu*.json"), *folder.glob("cuda.json")])}
    again, gpu, cpu = runs.pop("cpu-again", None), runs.pop("cuda", None), runs.pop("cpu")
    if again and again.machine["commit"] == cpu.machine["commit"]:
        cpu.again = again
    return cpu, gpu, list(runs.values())


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(line)} |" for line in lines)]


def table_of(rows: Iterable[dict[str, str]]) -> str:
    """Of rows that may lack cells."""
    frame = pd.DataFrame(rows).fillna("")
    return "\n".join(table(frame.columns, frame.to_numpy()))


def cost(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:.0f} MB"
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{1e3 * value:.0f} ms"


def cell(row: Any) -> str:
    """What a table says of a contender: the cost of the yardstick, the ratio of any other."""
    relative = row.group in RELATIVE
    if row.contender == row.yardstick:
        return row.cost if relative else f"{row.cost} ± {100 * row.noise:.0f} %"
    ratio, low, high = (f"{x:.{3 if relative else 2}f}" for x in (row.ratio, row.low, row.high))
    return ratio if low == high else f"{ratio} ({low} - {high})"


def cells_of(run: Result, group: str) -> pd.DataFrame:
    """A group's table, the yardstick first; with the bandwidth where memory is a bound."""
    cells, yardstick = run.find("cell", group), run.find("yardstick", group).iat[0, 0]
    cells.insert(0, yardstick, cells.pop(yardstick))
    rate, share = (run.find(column, group)[yardstick] for column in ("rate", "share"))
    if rate.notna().any():
        cells["GB/s"] = (rate / 1e9).map("{:.1f}".format, na_action="ignore")
        cells["of the measured bandwidth"] = (100 * share).map("{:.0f} %".format, na_action="ignore")
    return cells.reset_index()


def mean_of(run: Result) -> str:
    """How many times faster than the reference whole steps with SGD are."""
    faster = sgd_step(run)
    return NOT_MEASURED if faster.empty else f"{gmean(faster):.1f}x"


def where(run: Result) -> str:
    threads = run.machine["threads"]
    return f"{threads} thread{'s' * (threads != '1')} on {run.machine['device']}"


def readme_table(cpu: Result, others: Sequence[Result]) -> str:
    """What stands in the README between the two marks."""
    elements, costs, peers = cpu.find("elements", STEP), cpu.find("cost", STEP), than_peers(cpu)
    rows = [
        {
            "shapes, parameters": f"{case}, {elements.at[case, OURS] / 1e6:.1f}M",
            "whole step with SGD": costs.at[case, OURS],
            "faster than the reference": f"{faster:.1f}x",
            "than its best peer": f"{peers[case]:.1f}x" if case in peers else NOT_MEASURED,
        }
        for case, faster in sgd_step(cpu).items()
    ]
    rows.append({"shapes, parameters": "geometric mean", "faster than the reference": f"**{mean_of(cpu)}**"})
    m = cpu.machine
    head = f"{where(cpu)}, {m.get('instruction set', '')}; torch {m['torch']}; {m['date'][:10]}:"
    said = []
    if not (iterations := cpu.find("ratio", ITERATION)).empty:
        least, most = (iterations[[OURS, SAM_REFERENCE]].agg(end).map("{:.2f}".format) for end in ("min", "max"))
        # one number where the two look the same
        ours, reference = (" to ".join(dict.fromkeys(ends)) for ends in zip(least, most, strict=True))
        said.append(f"A SAM iteration takes {ours} of the time of two of SGD's; the reference's, {reference}.")
    for run in others:
        commit = run.machine["commit"]
        earlier = "" if commit == m["commit"] else f" (commit {commit[:7]})"
        said.append(f"With {where(run)}{earlier}, the mean of the table is {mean_of(run)}.")
    return "\n\n".join([BEGIN, head, table_of(rows), *filter(None, [" ".join(said)]), END])


def markdown(cpu: Result, gpu: Result | None, others: Sequence[Result]) -> str:
    """docs/benchmarks.md. Everything in it is computed from the saved rounds."""
    targets = [*judged(ON_THE_CPU, cpu), *judged(ON_A_GPU, gpu or Result({}))]
    settings = [{"name": name, "settings": text} for name, (_, text) in MAKERS.items()]
    blocks = [HEAD, table_of(targets), "## Contenders and their settings", table_of(settings)]
    blocks += ["## On the CPU", f"![Ratios, with their intervals]({PICTURE.as_posix()})", *page_of(cpu)]
    for other in others:
        blocks += [f"## {OTHER} {where(other)}", table_of(judged(ON_THE_CPU, other)), *page_of(other)]
    not_measured = "Not measured: no run with `--device cuda` is in `bench/results/`."
    return "\n\n".join([*blocks, "## On a GPU", *(page_of(gpu) if gpu else [not_measured])]) + "\n"


def page_of(run: Result) -> list[str]:
    blocks = ["\n".join(f"- {key}: {value}" for key, value in run.machine.items())]
    ways = {(way, name) for r in run.records for name, way in r.facts.get("timed by", {}).items()}
    if ways:
        by_way = pd.DataFrame(sorted(ways), columns=["by", "contenders"]).groupby("by", as_index=False)
        blocks += ["### How each was timed", table_of(by_way.agg("; ".join))]
    for title, (pattern, text) in SECTIONS.items():
        groups = [group for group in run.figures["group"].unique() if re.fullmatch(pattern, group)]
        blocks += [f"### {title}", text] if groups else []
        for group in groups:
            blocks += [f"**{group}**", table_of(cells_of(run, group))]
    if run.again and len(found := between_runs(run)):
        worst = [{"ratio to reference": name, "apart": f"{100 * x:.1f} %"} for name, x in found.nlargest(10).items()]
        within = f"{(found <= 0.15).sum()} of {len(found)} by at most 15 %. The ten worst:"
        blocks += ["### Two runs", f"A second run, {run.again.machine['date']}: {within}", table_of(worst)]
    if run.left_out:
        blocks += ["### Not run", "\n".join(f"- {text}" for text in run.left_out)]
    return blocks


def draw(run: Result, path: Path) -> None:
    """Bars with intervals of what the run has figures for."""
    figure, axes = plt.subplots(len(PANELS), figsize=(9, 3.6 * len(PANELS)), layout="constrained")
    for axis, group in zip(axes, PANELS, strict=True):
        # without contenders that not every case has, the yardstick, and SGD's single iteration
        ratio = run.find("ratio", group).filter(items=[*MODELS, *NETWORKS], axis="index")
        ratio = ratio.dropna(axis="columns").drop(columns=[RELATIVE.get(group, OURS), SGD_ONCE], errors="ignore")
        if ratio.empty:
            axis.set_axis_off()
            continue
        title = f"{group}: " + (f"time over that of {RELATIVE[group]}" if group in RELATIVE else "times faster than")
        low, high = (run.find(column, group).reindex_like(ratio) for column in ("low", "high"))
        errors = [[ratio[name] - low[name], high[name] - ratio[name]] for name in ratio]
        ratio.plot.bar(ax=axis, yerr=errors, width=0.8, rot=12, fontsize=8, error_kw={"lw": 0.8}, title=title)
        axis.set_xlabel("")
        axis.axhline(1, color="black", lw=0.8)
        axis.legend(fontsize=7, ncols=3, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="where bench/results, docs and README.md are")
    root = parser.parse_args(argv).root
    try:
        cpu, gpu, others = results(root)
    except KeyError:
        parser.error(f"there is no {root}/bench/results/cpu.json: run `make bench` and `make bench-report`")
    runs = filter(None, [cpu, cpu.again, gpu, *others])
    if root == ROOT and any(run.machine.get("selection") == "smoke" for run in runs):
        parser.error("a smoke run's or a rehearsal's figures say nothing and are not published, but with --root")
    page, readme = root / "docs" / "benchmarks.md", root / "README.md"
    made = readme_table(cpu, others)
    text, found = re.subn(f"{BEGIN}.*{END}", lambda _: made, readme.read_text(), flags=re.DOTALL)
    if not found:
        parser.error(f"{readme} lacks the marks {BEGIN} and {END}")
    draw(cpu, page.parent / PICTURE)
    page.write_text(markdown(cpu, gpu, others))
    readme.write_text(text)
    print(f"written: {page}\nwritten: {readme}")


if __name__ == "__main__":
    main()
