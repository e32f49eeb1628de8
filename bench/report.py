"""Turns saved runs into bench/results/*.json, docs/benchmarks.md with targets and picture, and the README's table.

    python -m bench.report [RUN.json ...] [--again SECOND.json] [--name OTHER] [--root DIR]

A run goes to ``bench/results/cpu.json`` or ``cuda.json``, by its device. With ``--name``, one on another CPU, or with
other threads, goes to ``cpu-OTHER.json`` beside them. Without any, everything is made again from what is there.
``--again``: a second run of the same commit, whose agreement with the first becomes part of the results.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from scipy.stats import gmean

from bench.contenders import BEST_PEERS, LARGE, LARGEST, MAKERS, MODELS, PEER_FOREACH, PUBLIC_LOOP, REFERENCE
from bench.processes import MEMORY, WEAK_SCALING
from bench.records import ROOT, Estimate, Record, Run, median
from bench.training import ASCENT, EVERY, ITERATION, PRICE, SGD_ONCE, SGD_TWICE, UNPERTURBED
from bench.training import REFERENCE as SAM_REFERENCE

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
UNITS = {"x": 1.0, "%": 1e2, "ms": 1e3, "us": 1e6, "launches": 1.0}
OTHER = "Another run:"
"""How the title begins of a section with a run beside the one in the README."""
BEGIN, END = "<!-- benchmarks: made by bench.report -->", "<!-- end of benchmarks -->"
RELATIVE = {ITERATION: SGD_TWICE, PRICE: SGD_ONCE, UNPERTURBED: SGD_ONCE, MEMORY: SGD_ONCE, WEAK_SCALING: "1 process"}
"""Groups whose tables say how much of this contender's cost each one's is; elsewhere: how many times faster we are."""
SECTIONS = {
    "Whole optimizer step": (
        "optimizer step, (SGD|AdamW|reference and public loop)",
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
PANELS = ("optimizer step, SGD", "optimizer step, AdamW", ITERATION)
"""Groups that are in the picture."""
PICTURE = Path("benchmarks") / "ratios.png"
HEAD = """# Benchmarks

Made by `python -m bench.report` from `bench/results/`; do not edit. How to run and read them: `bench/README.md`.

Ratios are medians over rounds of the quotient within the round, with the 95 % interval of the median.

## Targets"""

Values = Callable[[Run], pd.Series]
"""What finds figures in a run, by case; none if one of them is missing."""


def of(group: str, cases: Iterable[str], value: Callable[[Record], float | None]) -> Values:
    """A figure of the group's record of each case, all of which must be there. What is None is left out."""

    def find(run: Run) -> pd.Series:
        records = run.find(group)
        wanted = cases if records.keys() >= set(cases) else ()
        return pd.Series({case: value(records[case]) for case in wanted}, dtype=float).dropna()

    return find


def faster(group: str, cases: Iterable[str], *baselines: str) -> Values:
    """How many times faster than the best of the baselines. All must be there but pytorch_optimizer's foreach: it is
    slower than its loop, and not measured everywhere."""

    def ratio(r: Record) -> float | None:
        there = set(baselines) & r.rounds.keys()
        return r.faster_than_best(there) if there and set(baselines) - there <= {PEER_FOREACH} else None

    return of(group, cases, ratio)


def share(group: str, cases: Iterable[str]) -> Values:
    return of(group, cases, lambda r: median(r.shares()).value if r.shares() else None)


def of_sgd(name: str) -> Values:
    """Time over SGD's, in batches of 128."""
    return of(PRICE, ["ConvNet, batch 128"], lambda r: r.faster_than(name, SGD_ONCE).value)


def apart(run: Run) -> pd.Series:
    """How far the ratios of a second run were from this one's."""
    return pd.Series(run.agreement.get("apart"), dtype=float)


WITHOUT_LARGEST = [name for name in MODELS if name != LARGEST]
BIG = [name for name in LARGE if name != "resnet50"]
"""80M parameters and more."""
FIRST, STEP, ADAMW = "first_step, SGD", "optimizer step, SGD", "optimizer step, AdamW"
PUBLIC = "optimizer step, reference and public loop"
THAN, WHOLE = "times faster than the reference", "whole step with"
HOST = "host time of first_step for 161 parameters under 60 us, in a loop of its own"
host_time = of("first_step, host time, in a loop", ["161 x 8"], lambda r: r.seconds().value)
imported = of("import sam_fast after import torch", ["fresh process"], lambda r: r.seconds().value)
straw = of(PUBLIC, ["resnet18", "efficientnet_b0"], lambda r: 1 / r.faster_than(PUBLIC_LOOP).value - 1)
# the interval's lower end: no slower beyond the noise
no_slower = of(UNPERTURBED, ["resnet18", "resnet50"], lambda r: r.faster_than("sam_fast", SGD_ONCE).low)
than_peers = faster(STEP, MODELS, *BEST_PEERS)
foreach = faster(FIRST, ["resnet50"], PEER_FOREACH)
launches = of("second_step, SGD", ["resnet50"], lambda r: r.facts.get("launches", {}).get("sam_fast"))

ON_THE_CPU: list[tuple[str, str, str, Values]] = [
    (f"first_step at least 3.5 {THAN} on every set", ">= 3.5 x", "least", faster(FIRST, MODELS, REFERENCE)),
    ("first_step at least 4.5 times faster, geometric mean", ">= 4.5 x", "mean", faster(FIRST, MODELS, REFERENCE)),
    (f"{WHOLE} SGD at least 4 {THAN}, geometric mean", ">= 4 x", "mean", faster(STEP, MODELS, REFERENCE)),
    (f"{WHOLE} SGD at least 3 times faster on every set", ">= 3 x", "least", faster(STEP, MODELS, REFERENCE)),
    (f"{WHOLE} SGD at least twice as fast as the best peer, geometric mean", ">= 2 x", "mean", than_peers),
    ("the same on every set", ">= 2 x", "least", than_peers),
    (f"{WHOLE} AdamW at least 3 {THAN}, geometric mean", ">= 3 x", "mean", faster(ADAMW, WITHOUT_LARGEST, REFERENCE)),
    ("the same on every set", ">= 3 x", "least", faster(ADAMW, WITHOUT_LARGEST, REFERENCE)),
    ("SGD: at least 85 % of the measured bandwidth from 25M parameters on", ">= 85 %", "least", share(STEP, LARGE)),
    ("AdamW: the same", ">= 85 %", "least", share(ADAMW, [name for name in LARGE if name != LARGEST])),
    ("SAM with ascent=1/4 at most 1.35 of SGD's time, batches of 128", "<= 1.35 x", "most", of_sgd(ASCENT)),
    ("SAM with every=4 at most 1.30 of SGD's time, batches of 128", "<= 1.30 x", "most", of_sgd(EVERY)),
    ("a step that does not perturb no slower than SGD(fused=True), beyond the noise", "<= 1 x", "most", no_slower),
    (HOST, "<= 60 us", "mean", host_time),
    ("import adds under 50 ms", "<= 50 ms", "mean", imported),
    ("the reference at most 10 % slower than the public implementation's operations", "<= 10 %", "most", straw),
    ("two runs agree: every ratio to the reference within 15 %", "<= 15 %", "most", apart),
]
"""What is wanted, the bound, which of the figures must keep it ("least", "most", or their geometric "mean")."""
ON_A_GPU: list[tuple[str, str, str, Values]] = [
    (f"GPU: first_step on resnet50 at least 10 {THAN}", ">= 10 x", "mean", faster(FIRST, ["resnet50"], REFERENCE)),
    ("GPU: the same at least 3 times faster than pytorch_optimizer's foreach SAM", ">= 3 x", "mean", foreach),
    (f"GPU: whole step on resnet50 at least 10 {THAN}", ">= 10 x", "mean", faster(STEP, ["resnet50"], REFERENCE)),
    ("GPU: first_step at 90 % of a copy's rate from 80M parameters on", ">= 90 %", "least", share(FIRST, BIG)),
    ("GPU: whole step at 90 % of the same", ">= 90 %", "least", share(STEP, BIG)),
    (f"GPU: {HOST}", "<= 60 us", "mean", host_time),
    ("GPU: second_step is one launch", "<= 1 launches", "mean", launches),
]


def judged(wanted: list[tuple[str, str, str, Values]], run: Run) -> list[dict[str, str]]:
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


def results(root: Path, names: str) -> list[Run]:
    """The saved runs whose files are named so; a ``*`` stands for anything."""
    return [Run.load(path) for path in sorted((root / "bench" / "results").glob(f"{names}.json"))]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(line)} |" for line in lines)]


def table_of(rows: Iterable[dict[str, str]]) -> str:
    """Of rows that may lack cells; empty where there is no row."""
    frame = pd.DataFrame(rows).fillna("")
    return "\n".join(table(frame.columns, frame.to_numpy())) if len(frame) else ""


def section(title: str, *blocks: str) -> list[str]:
    """Nothing where all of it is empty."""
    return [title, *blocks] if any(blocks) else []


def cost(record: Record, name: str | None = None) -> str:
    value = record.seconds(name).value
    if record.facts.get("unit") == "bytes":
        return f"{value / 1e6:.0f} MB"
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{1e3 * value:.0f} ms"


def interval(estimate: Estimate, digits: int) -> str:
    value, low, high = (f"{x:.{digits}f}" for x in estimate)
    return value if low == high else f"{value} ({low} - {high})"


def span(low: float, high: float) -> str:
    """ "1.00 to 1.04", or one number where the two look the same."""
    return " to ".join(dict.fromkeys(f"{x:.2f}" for x in (low, high)))


def ratios(record: Record) -> dict[str, Estimate]:
    """By contender: how many times faster we are, or its cost over that of the group's yardstick (:data:`RELATIVE`)."""
    yardstick = RELATIVE.get(record.group, record.target)
    return {name: record.faster_than(name, yardstick) for name in record.rounds if name != yardstick}


def row(record: Record) -> dict[str, str]:
    """A record's line in its table."""
    case = {"case": record.case}
    yardstick = RELATIVE.get(record.group)
    others = {name: interval(ratio, 3 if yardstick else 2) for name, ratio in ratios(record).items()}
    if yardstick:
        return {**case, yardstick: cost(record, yardstick), **others}
    cells = {**case, record.target: f"{cost(record)} ± {100 * record.seconds().noise:.0f} %", **others}
    if shares := record.shares():
        cells["GB/s"] = f"{(record.bytes_moved or 0) / record.seconds().value / 1e9:.1f}"
        cells["of the measured bandwidth"] = f"{100 * median(shares).value:.0f} %"
    return cells


def steps_of(run: Run) -> list[Record]:
    """Whole steps with SGD on the models' shapes."""
    records = run.find("optimizer step, SGD").values()
    return [r for r in records if r.case in MODELS and set(BEST_PEERS) & set(r.rounds)]


def mean_of(run: Run) -> str:
    """How many times faster than the reference these are."""
    ratios = [r.faster_than(REFERENCE).value for r in steps_of(run)]
    return f"{gmean(ratios):.1f}x" if ratios else NOT_MEASURED


def where(run: Run) -> str:
    """A CPU's threads and name."""
    threads = run.machine["threads"]
    return f"{threads} thread{'s' * (threads != '1')} on {run.machine['device']}"


def readme_table(cpu: Run, others: Sequence[Run] = ()) -> str:
    """What stands in the README between the two marks."""
    rows = [
        {
            "shapes, parameters": f"{r.case}, {r.elements / 1e6:.1f}M",
            "whole step with SGD": cost(r),
            "faster than the reference": f"{r.faster_than(REFERENCE).value:.1f}x",
            "than its best peer": f"{r.faster_than_best(BEST_PEERS):.1f}x",
        }
        for r in steps_of(cpu)
    ]
    rows.append({"shapes, parameters": "geometric mean", "faster than the reference": f"**{mean_of(cpu)}**"})
    m = cpu.machine
    head = f"{where(cpu)}, {m.get('instruction set', '')}; torch {m['torch']}; {m['date'][:10]}:"
    said = []
    if iterations := cpu.find(ITERATION).values():
        ratios = [[r.faster_than(name, SGD_TWICE).value for r in iterations] for name in ("sam_fast", SAM_REFERENCE)]
        ours, reference = (span(min(its), max(its)) for its in ratios)
        said.append(f"A SAM iteration takes {ours} of the time of two of SGD's; the reference's, {reference}.")
    for run in others:
        commit = run.machine["commit"]
        earlier = "" if commit == m["commit"] else f" (commit {commit[:7]})"
        said.append(f"With {where(run)}{earlier}, the mean of the table is {mean_of(run)}.")
    return "\n\n".join([BEGIN, head, table_of(rows), *filter(None, [" ".join(said)]), END])


def markdown(cpu: Run, gpus: Sequence[Run] = (), others: Sequence[Run] = ()) -> str:
    """docs/benchmarks.md. Everything in it is computed from the saved rounds."""
    gpu = gpus[0] if gpus else Run({})
    not_measured = "Not measured: no run with `--device cuda` is in `bench/results/`."
    blocks = [HEAD, table_of([*judged(ON_THE_CPU, cpu), *judged(ON_A_GPU, gpu)])]
    blocks += ["## Contenders and their settings", table_of({"name": n, "settings": MAKERS[n][1]} for n in MAKERS)]
    blocks += ["## On the CPU", f"![Ratios, with their intervals]({PICTURE.as_posix()})", *page_of(cpu)]
    for other in others:
        blocks += [f"## {OTHER} {where(other)}", table_of(judged(ON_THE_CPU, other)), *page_of(other)]
    return "\n\n".join([*blocks, "## On a GPU", *(page_of(gpu) if gpus else [not_measured])]) + "\n"


def page_of(run: Run) -> list[str]:
    blocks = ["\n".join(f"- {key}: {value}" for key, value in run.machine.items() if key != "kind")]
    ways = {(way, name) for r in run.records for name, way in r.facts.get("timed by", {}).items()}
    by_way = pd.DataFrame(sorted(ways), columns=["by", "contenders"]).groupby("by", as_index=False).agg("; ".join)
    blocks += section("### How each was timed", table_of(by_way.to_dict("records")))
    for title, (pattern, text) in SECTIONS.items():
        groups = [group for group in dict.fromkeys(r.group for r in run.records) if re.fullmatch(pattern, group)]
        blocks += [f"### {title}", text] if groups else []
        for group in groups:
            blocks += [f"**{group}**", table_of(map(row, run.find(group).values()))]
    if run.agreement:
        found = apart(run)
        worst = [{"ratio to reference": name, "apart": f"{100 * x:.1f} %"} for name, x in found.nlargest(10).items()]
        within = f"{(found <= 0.15).sum()} of {len(found)} by at most 15 %. The ten worst:"
        blocks += ["### Two runs", f"A second run, {run.agreement['date']}: {within}", table_of(worst)]
    return blocks + section("### Not run", "\n".join(f"- {text}" for text in run.left_out))


def draw(run: Run, path: Path) -> None:
    """Bars with intervals of what the run has figures for."""
    figure, axes = plt.subplots(len(PANELS), figsize=(9, 3.6 * len(PANELS)), layout="constrained")
    for axis, group in zip(axes, PANELS, strict=True):
        by_case = {r.case: ratios(r) for r in run.find(group).values() if r.case in MODELS or group == ITERATION}
        if not by_case:
            axis.set_axis_off()
            continue
        title = f"{group}: " + (f"time over that of {RELATIVE[group]}" if group in RELATIVE else "times faster than")
        # without names that not every case has, and SGD's single iteration
        frame = pd.DataFrame(by_case).T.dropna(axis="columns").drop(columns=SGD_ONCE, errors="ignore")
        value, low, high = (frame.map(lambda e, of=of: getattr(e, of)) for of in Estimate._fields)
        errors = [[value[n] - low[n], high[n] - value[n]] for n in value]
        value.plot.bar(ax=axis, yerr=errors, width=0.8, rot=12, fontsize=8, error_kw={"lw": 0.8}, title=title)
        axis.axhline(1, color="black", lw=0.8)
        axis.legend(fontsize=7, ncols=3, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="files written by `pytest bench --save`")
    parser.add_argument("--again", type=Path, help="a second run of the same commit, on a CPU")
    parser.add_argument("--name", help="of a run on another CPU or with other threads, which has a section of its own")
    parser.add_argument("--root", type=Path, default=ROOT, help="where bench/results, docs and README.md are")
    arguments = parser.parse_args(argv)
    root, name = arguments.root, arguments.name
    for run in map(Run.load, arguments.runs):
        kind = run.machine["kind"]
        if root == ROOT and run.machine["selection"] in ("smoke", "rehearsal"):
            parser.error("a smoke run's or a rehearsal's figures say nothing and are not published, but with --root")
        if name and (kind != "cpu" or len(arguments.runs) > 1):
            parser.error("--name takes one run, on a CPU")
        if arguments.again and kind == "cpu":
            run.compare(Run.load(arguments.again))
        run.save(root / "bench" / "results" / (f"{kind}-{name}.json" if name else f"{kind}.json"))
    cpus, gpus, others = (results(root, names) for names in ("cpu", "cuda", "cpu-*"))
    if not cpus:
        parser.error(f"there is no {root}/bench/results/cpu.json: run `make bench`, give its file to bench.report")
    page, readme = root / "docs" / "benchmarks.md", root / "README.md"
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        parser.error(f"{readme} lacks the marks {BEGIN} and {END}")
    draw(cpus[0], page.parent / PICTURE)
    page.write_text(markdown(cpus[0], gpus, others))
    readme.write_text(before + readme_table(cpus[0], others) + after)
    print(f"written: {page}\nwritten: {readme}")


if __name__ == "__main__":
    main()
