"""Turns saved runs into bench/results/*.json, docs/benchmarks.md with its pictures, and the README's table.

    python -m bench.report [RUN.json ...] [--again SECOND.json] [--root DIR]

A run goes to ``bench/results/cpu.json`` or ``cuda.json``, by its device; several files of one device are parts of one
run. Without any, everything is made again from what is there. ``--again``: a second run of the same commit, whose
agreement with the first becomes part of the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import peers, targets
from bench.machine import ROOT
from bench.records import Estimate, Record, Run, disagreement, geometric_mean
from bench.shapes import MODELS
from bench.test_training import GRAPH, REFERENCE, SGD_ONCE, SGD_TWICE
from bench.test_weak_scaling import GROUP as WEAK_SCALING

BEGIN, END = "<!-- benchmarks: made by bench.report -->", "<!-- end of benchmarks -->"
PICTURES = {
    "step": "How many times faster the whole step is than each baseline",
    "roofline": "Share of the streaming copy's bandwidth",
    "scaling": "Cost against size, with the floor",
    "training": "A SAM iteration over two of SGD's",
    "memory": "Peak memory of a training step",
}


def results(root: Path, kind: str) -> Run | None:
    path = root / "bench" / "results" / f"{kind}.json"
    return Run.load(path) if path.is_file() else None


# ---- Tables ----------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]


def milliseconds(record: Record, name: str | None = None) -> str:
    value = 1e3 * record.seconds(name).value
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def times(record: Record | None, baseline: str) -> str:
    if record is None or baseline not in record.rounds:
        return ""
    ratio = record.faster_than(baseline)
    return f"{ratio.value:.2f} ({ratio.low:.2f} - {ratio.high:.2f})"


def share(record: Record | None) -> str:
    estimate = record.share_of_copy() if record is not None else None
    return "" if estimate is None else f"{100 * estimate.value:.0f} %"


def gigabytes(record: Record) -> str:
    rate = record.bandwidth()
    return "" if rate is None else f"{rate / 1e9:.1f}"


def made_on(run: Run) -> str:
    m = run.machine
    tree = m.get("commit", "")
    short = tree[:9] + (" with changes" if tree.endswith("with changes") else "")
    threads = f", {m['threads']} threads, {m['instruction set']}" if "threads" in m else ""
    return f"{m['device']}{threads}; torch {m['torch']}; {m['date'][:10]}, commit {short}"


def readme_table(cpu: Run) -> str:
    """What stands in the README between the two marks."""
    head = [
        "shapes",
        "parameters",
        "first_step",
        "reference",
        "faster",
        "whole step, SGD",
        "faster than the reference",
        "than its best peer",
        "of a copy's bandwidth",
        "AdamW, faster",
    ]
    rows, ratios = [], []
    for name in MODELS:
        first, sgd, adamw = (
            cpu.get(f"{group}", name) for group in ("first_step, SGD", "optimizer step, SGD", "optimizer step, AdamW")
        )
        if first is None or sgd is None or adamw is None:
            continue
        best = sgd.faster_than_best(peers.BEST_PEERS).value if set(peers.BEST_PEERS) & set(sgd.rounds) else float("nan")
        four = [
            first.faster_than(peers.REFERENCE).value,
            sgd.faster_than(peers.REFERENCE).value,
            best,
            adamw.faster_than(peers.REFERENCE).value,
        ]
        ratios.append(four)
        cells = [
            name,
            f"{first.elements / 1e6:.1f}M",
            milliseconds(first),
            milliseconds(first, peers.REFERENCE),
            f"{four[0]:.1f}x",
        ]
        rows.append([*cells, milliseconds(sgd), f"{four[1]:.1f}x", f"{four[2]:.1f}x", share(sgd), f"{four[3]:.1f}x"])
    if rows:
        means = [f"**{geometric_mean(column):.1f}x**" for column in zip(*ratios, strict=True)]
        rows.append(["geometric mean", "", "", "", means[0], "", means[1], means[2], "", means[3]])
    return "\n".join([BEGIN, "", f"{made_on(cpu)}:", "", *table(head, rows), "", END])


def replace_marked(text: str, new: str) -> str:
    """``text`` with what stands between the marks replaced.

    Raises:
        ValueError: the marks are missing.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"README.md lacks the marks {BEGIN} and {END}")
    return text[:begin] + new + text[end + len(END) :]


# ---- The page --------------------------------------------------------------------------------------------------------


def markdown(cpu: Run, gpu: Run | None = None, pictures: tuple[str, ...] = tuple(PICTURES)) -> str:
    """docs/benchmarks.md. Everything in it is computed from the saved rounds."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m bench.report` from `bench/results/`; do not edit. How to run and read them: "
        "`bench/README.md`.",
        "",
    ]
    lines += [
        "Ratios are medians over rounds of the quotient within the round, with the 95 % interval of the median.",
        "",
    ]
    lines += [
        "## Targets",
        "",
        *table(
            ["issue", "target", "measured", ""],
            [[f"{x.issue}", x.target, x.measured, x.state] for x in targets.lines(cpu, gpu)],
        ),
    ]
    lines += ["", *page_of(cpu, pictures)]
    if gpu is not None:
        lines += ["", *page_of(gpu, ())]
    else:
        lines += ["", "## On a GPU", "", "Not measured: no run with `--device cuda` is in `bench/results/`."]
    return "\n".join(lines) + "\n"


def picture(name: str, pictures: tuple[str, ...]) -> list[str]:
    return [f"![{PICTURES[name]}](benchmarks/{name}.png)", ""] if name in pictures else []


def page_of(run: Run, pictures: tuple[str, ...]) -> list[str]:
    kind = {"cpu": "On the CPU", "cuda": "On a GPU"}[run.machine["kind"]]
    lines = [f"## {kind}", "", *(f"- {key}: {value}" for key, value in run.machine.items() if key != "kind"), ""]
    lines += [*timing(run), *baseline_settings(run)]
    lines += ["### Whole optimizer step", ""]
    lines += [
        "first_step and second_step, each with the gradients of a new backward pass. Times faster than each baseline.",
        "",
        *picture("step", pictures),
    ]
    for group in dict.fromkeys(
        r.group for r in run.records if r.group.startswith("optimizer step") and "scaling" not in r.group
    ):
        lines += comparison(run, group)
    lines += ["### Its halves", ""]
    for group in dict.fromkeys(r.group for r in run.records if r.group.startswith(("first_step, ", "second_step, "))):
        if "scaling" not in group and "host" not in group and "public" not in group:
            lines += comparison(run, group)
    lines += [
        "### Operations and roofline",
        "",
        "Bytes that must move, over a streaming copy that ran in the same rounds.",
        "",
        *picture("roofline", pictures),
    ]
    for group in dict.fromkeys(r.group for r in run.records if r.group.startswith(("op ", "BatchNorm"))):
        lines += comparison(run, group)
    lines += ["### Host overhead", ""]
    for group in dict.fromkeys(r.group for r in run.records if "host time" in r.group or r.group.startswith("import")):
        lines += comparison(run, group)
    lines += ["### Scaling", "", *picture("scaling", pictures), *scaling_table(run)]
    if run.find(WEAK_SCALING):
        lines += [
            "### Weak scaling",
            "",
            f"Each process has one {'thread' if run.machine['kind'] == 'cpu' else 'GPU'} and resnet18's parameters, as "
            "replicas or as shards of "
            "DTensors. The last column is the efficiency: what one process takes over what each of several takes.",
            "",
            *comparison(run, WEAK_SCALING),
        ]
    lines += ["### Whole training iteration", "", *picture("training", pictures), *training_table(run)]
    lines += ["### Memory", "", *picture("memory", pictures), *memory_table(run)]
    if run.agreement.get("all"):
        worst = sorted(run.agreement["all"].items(), key=lambda item: -item[1])[:10]
        lines += [
            "### Two runs",
            "",
            f"A second run of the same commit, {run.agreement['date']}: how far ratios to the reference are apart, the "
            "ten worst of ",
        ]
        lines[-1] += f"{len(run.agreement['all'])}."
        lines += [
            "",
            *table(["record", "apart"], [[key.replace(" | ", ", "), f"{100 * value:.1f} %"] for key, value in worst]),
            "",
        ]
    if run.left_out:
        lines += ["### Not run", "", *(f"- {text}" for text in run.left_out)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def timing(run: Run) -> list[str]:
    """How a GPU's figures were taken; nothing for a CPU's, which are all the host's clock."""
    ways: dict[str, set[str]] = {}
    for record in run.records:
        for name, way in record.facts.get("timed by", {}).items():
            ways.setdefault(way, set()).add(f"{name} ({record.group}, {record.case})" if "durations" in way else name)
    rows = [[way, "; ".join(sorted(names))] for way, names in ways.items()]
    return ["### How each was timed", "", *table(["by", "contenders"], rows), ""] if rows else []


def baseline_settings(run: Run) -> list[str]:
    settings: dict[str, str] = {}
    for record in run.records:
        for name, text in record.facts.get("settings", {}).items():
            settings.setdefault(name, text)
    rows = [[name, text] for name, text in settings.items()]
    return ["### Contenders and their settings", "", *table(["name", "settings"], rows), ""] if rows else []


def comparison(run: Run, group: str) -> list[str]:
    records = run.find(group)
    names = list(dict.fromkeys(name for r in records for name in r.baselines))
    bound = any(r.copy_rounds for r in records)
    head = ["case", records[0].target, *names, *(["GB/s", "of the copy"] if bound else [])]
    rows = []
    for r in records:
        spread = f"{milliseconds(r)} ± {100 * r.seconds().noise:.0f} %"
        rows.append([r.case, spread, *(times(r, name) for name in names), *([gigabytes(r), share(r)] if bound else [])])
    return [f"**{group}**", "", *table(head, rows), ""]


def scaling_table(run: Run) -> list[str]:
    records = [r for r in run.records if r.group.startswith("optimizer step, scaling")]
    rows = []
    for r in records:
        floor = r.floor()
        rows.append(
            [
                r.group.removeprefix("optimizer step, scaling with the "),
                r.case,
                milliseconds(r),
                f"{1e3 * floor:.3g} ms" if floor else "",
                times(r, peers.REFERENCE),
            ]
        )
    return (
        [*table(["against", "elements in tensors", "sam_fast", "floor", "times faster than the reference"], rows), ""]
        if rows
        else []
    )


def training_table(run: Run) -> list[str]:
    rows = []
    for r in run.find("training iteration"):
        ours, theirs = r.faster_than("sam_fast", SGD_TWICE), r.faster_than(REFERENCE, SGD_TWICE)
        graph = [f"{r.faster_than(GRAPH, SGD_ONCE).value:.3f}"] if GRAPH in r.rounds else [""]
        parameters = f"{r.elements / 1e6:.2f}M"
        rows.append(
            [
                r.case,
                parameters,
                *(milliseconds(r, n) for n in (SGD_ONCE, SGD_TWICE, REFERENCE, "sam_fast")),
                interval(theirs),
                interval(ours),
                *graph,
            ]
        )
    head = [
        "network",
        "parameters",
        SGD_ONCE,
        SGD_TWICE,
        REFERENCE,
        "sam_fast",
        f"{REFERENCE} / {SGD_TWICE}",
        f"sam_fast / {SGD_TWICE}",
        "CUDA graph / eager SGD",
    ]
    return [*table(head, rows), ""] if rows else []


def interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} - {estimate.high:.3f})"


def memory_table(run: Run) -> list[str]:
    if not run.memory:
        return []
    plain = next((m.bytes_peak for m in run.memory if m.contender == "SGD"), None)
    rows = [
        [m.contender, f"{m.bytes_peak / 1e6:.0f} MB", f"{m.bytes_peak / plain:.2f}" if plain else ""]
        for m in run.memory
    ]
    first = run.memory[0]
    return [
        f"Three training steps of {first.case}, {first.how}, above what was there before the model.",
        "",
        *table(["", "peak", "over SGD"], rows),
        "",
    ]


# ---- Writing ---------------------------------------------------------------------------------------------------------


def compare_runs(first: Run, second: Run) -> None:
    """Note in ``first`` how far ``second`` is from it."""
    apart = disagreement(first, second)
    where = max(apart, key=lambda key: apart[key])
    first.agreement |= {
        "date": second.machine["date"],
        "largest": round(apart[where], 4),
        "where": where.replace(" | ", ", "),
        "all": {k: round(v, 4) for k, v in apart.items()},
    }


def write(root: Path) -> list[Path]:
    """Make the page, the pictures and the README's table from ``root``'s results; returns the files."""
    from bench.plots import draw_all

    cpu = results(root, "cpu")
    if cpu is None:
        raise SystemExit(
            f"there is no {root}/bench/results/cpu.json: run `make bench` and give its file to bench.report"
        )
    page, readme = root / "docs" / "benchmarks.md", root / "README.md"
    drawn = draw_all(cpu, root / "docs" / "benchmarks")
    page.write_text(markdown(cpu, results(root, "cuda"), tuple(Path(name).stem for name in drawn)))
    readme.write_text(replace_marked(readme.read_text(), readme_table(cpu)))
    return [page, readme]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="files written by `pytest bench --save`")
    parser.add_argument("--again", type=Path, help="a second run of the same commit")
    parser.add_argument("--root", type=Path, default=ROOT, help="where bench/results, docs and README.md are")
    arguments = parser.parse_args(argv)
    runs: dict[str, Run] = {}
    for path in arguments.runs:
        part = Run.load(path)
        run = runs.setdefault(part.machine["kind"], part)
        if run is not part:
            run.add(part)
    for run in runs.values():
        if arguments.root == ROOT and run.machine["selection"] in ("smoke", "rehearsal"):
            parser.error(
                "a smoke run's or a rehearsal's figures say nothing and are not published; --root writes them elsewhere"
            )
        before = results(arguments.root, run.machine["kind"])
        if before is not None and "planted" in before.agreement:
            run.agreement["planted"] = before.agreement["planted"]  # made by itself, see bench.planted
        if arguments.again is not None and run.machine["kind"] == "cpu":
            compare_runs(run, Run.load(arguments.again))
        run.save(arguments.root / "bench" / "results" / f"{run.machine['kind']}.json")
    for written in write(arguments.root):
        print(f"written: {written}")


if __name__ == "__main__":
    main()
