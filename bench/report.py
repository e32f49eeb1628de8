"""Turns saved runs into bench/results/*.json, docs/benchmarks.md with its pictures, and the README's table.

    python -m bench.report [RUN.json ...] [--again SECOND.json] [--name OTHER] [--root DIR]

A run goes to ``bench/results/cpu.json`` or ``cuda.json``, by its device. With ``--name``, one on another CPU, or with
other threads, goes to ``cpu-OTHER.json`` beside them. Without any, everything is made again from what is there.
``--again``: a second run of the same commit, whose agreement with the first becomes part of the results.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from scipy.stats import gmean

from bench import targets
from bench.machine import ROOT
from bench.models import MODELS, NETWORKS
from bench.peers import BEST_PEERS, REFERENCE
from bench.processes import MEMORY, PLAIN, WEAK_SCALING
from bench.records import Estimate, Record, Run, median
from bench.training import ITERATION, PRICE, SGD_ONCE, SGD_TWICE, UNPERTURBED
from bench.training import REFERENCE as SAM_REFERENCE

OTHER = "Another run:"
"""How the title begins of a section with a run beside the one in the README."""
BEGIN, END = "<!-- benchmarks: made by bench.report -->", "<!-- end of benchmarks -->"
RELATIVE = {ITERATION: SGD_TWICE, PRICE: SGD_ONCE, UNPERTURBED: SGD_ONCE, MEMORY: PLAIN, WEAK_SCALING: "1 process"}
"""Groups whose tables say how much of this contender's cost each one's is; elsewhere: how many times faster we are."""
SECTIONS = {
    "Whole optimizer step": (
        "(?P<table>optimizer step, (SGD|AdamW|reference and public loop))",
        "first_step and second_step, each with the gradients of a new backward pass. Times faster than each baseline. "
        "The bandwidth is given where the last level cache would hold at most a tenth of the bytes that move.",
    ),
    "Its halves": ("(?P<table>(first|second)_step, (SGD|AdamW))", ""),
    "Operations": (
        r"(?P<row>.+), (?P<table>operation)",
        "Bytes that must move, over the bandwidth measured in the same rounds.",
    ),
    "Host overhead": ("(?P<table>(first|second)_step, host time.*|import.*)", ""),
    "Scaling": ("optimizer step, (?P<table>scaling.*)", "Whole step with SGD. Cases are elements in tensors."),
    "Weak scaling": (
        f"(?P<table>{WEAK_SCALING})",
        "Each process has a thread (or GPU) and resnet18's parameters, as replicas or as shards of DTensors: time of "
        "several over that of one.",
    ),
    "Whole training iteration": (f"(?P<table>{ITERATION})", "Time over that of two iterations of SGD."),
    "Fewer passes": (f"(?P<table>{PRICE}|{UNPERTURBED})", "Time over that of SGD."),
    "Memory": (f"(?P<table>{MEMORY})", "Three training steps, above what was there before the model."),
}
"""Title -> pattern of its groups, which says what their table is called and what their rows are besides the case, and
an explanation."""
PANELS = {
    "optimizer step, SGD": "whole step with SGD: times faster than",
    "optimizer step, AdamW": "whole step with AdamW: times faster than",
    ITERATION: "SAM's iteration / two of SGD's",
}
"""Of the picture: group -> what its bars are."""
PICTURE = Path("benchmarks") / "ratios.png"
HEAD = """# Benchmarks

Made by `python -m bench.report` from `bench/results/`; do not edit. How to run and read them: `bench/README.md`.

Ratios are medians over rounds of the quotient within the round, with the 95 % interval of the median.

## Targets
""".splitlines()


def results(root: Path, names: str) -> list[Run]:
    """The saved runs whose files are named so; a ``*`` stands for anything."""
    return [Run.load(path) for path in sorted((root / "bench" / "results").glob(f"{names}.json"))]


# ---- Tables ----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(line)} |" for line in lines)]


def table_of(rows: list[dict[str, str]], heading: str = "") -> list[str]:
    """Of rows that may lack cells, below its heading and with an empty line after it; nothing where there is no row."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    lines = [*table(head, [[row.get(name, "") for name in head] for row in rows]), ""]
    return [*([heading, ""] if heading else []), *lines] if rows else []


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


def row(record: Record, besides: str | None = None) -> dict[str, str]:
    """A record's line in its table."""
    case = {"case": ", ".join(filter(None, [record.case, besides]))}
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
    return f"{gmean(ratios):.1f}x" if ratios else targets.NOT_MEASURED


def where(run: Run) -> str:
    """A CPU's threads and name."""
    threads = run.machine["threads"]
    return f"{threads} thread{'' if threads == '1' else 's'} on {run.machine['device']}"


def readme_table(cpu: Run, others: Sequence[Run] = ()) -> str:
    """What stands in the README between the two marks."""
    steps = steps_of(cpu)
    rows = [
        {
            "shapes, parameters": f"{r.case}, {r.elements / 1e6:.1f}M",
            "whole step with SGD": cost(r),
            "faster than the reference": f"{r.faster_than(REFERENCE).value:.1f}x",
            "than its best peer": f"{r.faster_than_best(BEST_PEERS):.1f}x",
        }
        for r in steps
    ]
    rows.append({"shapes, parameters": "geometric mean", "faster than the reference": f"**{mean_of(cpu)}**"})
    m = cpu.machine
    head = f"{where(cpu)}, {m.get('instruction set', '')}; torch {m['torch']}; {m['date'][:10]}:"
    lines = [BEGIN, "", head, "", *table_of(rows)]
    said = []
    if iterations := cpu.find(ITERATION).values():
        ratios = [[r.faster_than(name, SGD_TWICE).value for r in iterations] for name in ("sam_fast", SAM_REFERENCE)]
        ours, reference = (span(min(its), max(its)) for its in ratios)
        said.append(f"A SAM iteration takes {ours} of the time of two of SGD's; the reference's, {reference}.")
    for run in others:
        commit = run.machine["commit"]
        earlier = "" if commit == m["commit"] else f" (commit {commit[:7]})"
        said.append(f"With {where(run)}{earlier}, the mean of the table is {mean_of(run)}.")
    lines += [" ".join(said), ""] if said else []
    return "\n".join([*lines, END])


# ---- The page --------------------------------------------------------------------------------------------------------


def markdown(cpu: Run, gpus: Sequence[Run] = (), others: Sequence[Run] = ()) -> str:
    """docs/benchmarks.md. Everything in it is computed from the saved rounds."""
    not_measured = ["Not measured: no run with `--device cuda` is in `bench/results/`."]
    gpu = gpus[0] if gpus else None
    on_a_gpu = page_of(gpu) if gpu else not_measured
    lines = [*HEAD, "", *table_of([*targets.on_the_cpu(cpu), *targets.on_a_gpu(gpu)])]
    lines += ["## On the CPU", "", f"![Ratios, with their intervals]({PICTURE.as_posix()})", "", *page_of(cpu)]
    for other in others:
        lines += [f"## {OTHER} {where(other)}", "", *table_of(targets.on_the_cpu(other)), *page_of(other)]
    return "\n".join([*lines, "## On a GPU", "", *on_a_gpu]).rstrip("\n") + "\n"


def page_of(run: Run) -> list[str]:
    lines = [*(f"- {key}: {value}" for key, value in run.machine.items() if key != "kind"), ""]
    ways = {(way, name) for r in run.records for name, way in r.facts.get("timed by", {}).items()}
    by_way = pd.DataFrame(sorted(ways), columns=["by", "contenders"]).groupby("by", as_index=False).agg("; ".join)
    lines += table_of(by_way.to_dict("records"), "### How each was timed")
    settings = {name: said for r in reversed(run.records) for name, said in r.facts.get("settings", {}).items()}
    said = [{"name": name, "settings": said} for name, said in sorted(settings.items())]
    lines += table_of(said, "### Contenders and their settings")
    for title, (pattern, text) in SECTIONS.items():
        tables: dict[str, list[dict[str, str]]] = defaultdict(list)
        for r in run.records:
            if found := re.fullmatch(pattern, r.group):
                tables[found["table"]].append(row(r, found.groupdict().get("row")))
        lines += [f"### {title}", "", *([text, ""] if text else [])] if tables else []
        for name, rows in tables.items():
            lines += table_of(rows, f"**{name}**")
    if run.agreement:
        apart = targets.apart(run)
        worst = [{"record": name, "apart": f"{100 * value:.1f} %"} for name, value in apart.nlargest(10).items()]
        said = f"A second run of the same commit, {run.agreement['date']}: how far ratios to the reference are apart"
        within = f"{(apart <= 0.15).sum()} of {len(apart)} by at most 15 %. The ten worst:"
        lines += ["### Two runs", "", f"{said}. {within}", "", *table_of(worst)]
    return lines + (["### Not run", "", *(f"- {text}" for text in run.left_out), ""] if run.left_out else [])


def draw(run: Run, path: Path) -> None:
    """Bars with intervals of what the run has figures for."""
    figure, axes = plt.subplots(len(PANELS), figsize=(9, 3.6 * len(PANELS)), layout="constrained")
    for axis, (group, title) in zip(axes, PANELS.items(), strict=True):
        by_case = {r.case: ratios(r) for r in run.find(group).values() if r.case in (*MODELS, *NETWORKS)}
        if not by_case:
            axis.set_axis_off()
            continue
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
    text, marks = re.subn(
        f"{BEGIN}.*{END}", lambda _: readme_table(cpus[0], others), readme.read_text(), flags=re.DOTALL
    )
    if not marks:
        parser.error(f"{readme} lacks the marks {BEGIN} and {END}")
    draw(cpus[0], page.parent / PICTURE)
    page.write_text(markdown(cpus[0], gpus, others))
    readme.write_text(text)
    print(f"written: {page}\nwritten: {readme}")


if __name__ == "__main__":
    main()
