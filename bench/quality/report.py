"""Makes docs/quality.md and its pictures from the results on file: ``python -m bench.quality report``."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from bench.figures import Estimate, median
from bench.quality import plan
from bench.quality.contenders import CONTENDERS, TITLES
from bench.quality.pictures import cost_picture, price_picture, save, tuning_picture
from bench.quality.tasks import SUBJECTS, TASKS
from bench.quality.timing import TIMES
from bench.records import ROOT
from bench.report import table

PAGE, PICTURES = ROOT / "docs" / "quality.md", ROOT / "docs" / "quality"
RESAMPLES = 9999
BEGIN, END = "<!-- accuracy per cost: made by bench.quality -->", "<!-- end of accuracy per cost -->"


def resampled(statistic: Any, *samples: list[float]) -> Estimate:
    """A statistic with its 95 % interval from a paired bootstrap over the seeds (percentiles)."""
    columns = [np.asarray(s) for s in samples]
    value = float(statistic(*columns, axis=-1))
    if len(columns[0]) < 3:
        return Estimate(value, float("-inf"), float("inf"))
    rng = np.random.default_rng(0)
    found = bootstrap(columns, statistic, paired=True, n_resamples=RESAMPLES, method="percentile", rng=rng)
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def mean_difference(a: Any, b: Any, axis: int) -> Any:
    return np.mean(a, axis=axis) - np.mean(b, axis=axis)


def retained(a: Any, sgd: Any, sam: Any, axis: int) -> Any:
    """The share of SAM's gain over SGD that ``a`` keeps."""
    return mean_difference(a, sgd, axis) / mean_difference(sam, sgd, axis)


@dataclass(frozen=True)
class Row:
    """A contender on a task: its runs with the chosen setting, next to those of SGD and SAM on the same seeds."""

    task: str
    contender: str
    setting: plan.Setting | None
    runs: list[dict[str, Any]]
    sgd: list[dict[str, Any]]
    sam: list[dict[str, Any]]
    time: Estimate | None

    @property
    def complete(self) -> bool:
        return len(self.runs) == plan.size(self.task, self.contender)[1]

    @property
    def cost(self) -> float:
        return float(np.mean([r["cost"] for r in self.runs]))

    @property
    def accuracies(self) -> list[list[float]]:
        return [[r["accuracy"] for r in runs] for runs in (self.runs, self.sgd, self.sam)]

    @cached_property
    def gain(self) -> Estimate:
        """Over SGD, in points."""
        return resampled(mean_difference, *self.accuracies[:2])

    @cached_property
    def share(self) -> Estimate:
        """R, the retained gain."""
        return resampled(retained, *self.accuracies)

    @property
    def sharpness(self) -> float | None:
        """The share of SAM's reduction of sharpness; None where a run diverged."""
        columns = [[r["sharpness"] for r in runs] for runs in (self.runs, self.sgd, self.sam)]
        return None if any(None in c for c in columns) else float(retained(*map(np.asarray, columns), axis=-1))

    @property
    def verdict(self) -> str:
        if not self.complete:
            return "unfinished"
        if self.contender in ("sgd", "sam"):
            return ""
        r, sharp = self.share, self.sharpness
        if 0.75 <= r.value < 0.9 and self.time is not None and self.time.value <= 1.05:
            return "not accepted, but R >= 0.75 at <= 1.05"
        if r.value < 0.9 or r.low < 0.75:
            return "R < 0.7" if r.value < 0.7 else "not accepted"
        if sharp is None or sharp < 0.8:
            return "not accepted: sharpness"
        if self.time is None:
            return "accepted if its time is at most 1.30"
        if self.time.value > 1.3:
            return "not accepted: time"
        return "accepted, stretch" if self.time.value <= 1.15 else "accepted"


def rows(task: str, results: plan.Results, times: dict[str, Any]) -> list[Row]:
    """A row for each contender, with the seeds that it, SGD and SAM have all run on."""
    settings = {name: plan.chosen(task, name, results) for name in CONTENDERS}

    def runs(name: str) -> dict[int, dict[str, Any]]:
        setting = settings[name]
        todo = {seed: plan.run_of(task, name, setting, seed) for seed in plan.seeds_of(task)[2]} if setting else {}
        return {seed: results[run] for seed, run in todo.items() if run in results}

    sgd, sam = runs("sgd"), runs("sam")
    seconds = times.get("seconds", {}).get(task, {})
    found = []
    for name in CONTENDERS:
        own = runs(name)
        common = [seed for seed in own if seed in sgd and seed in sam]
        time = median([a / b for a, b in zip(seconds[name], seconds["sgd"], strict=True)]) if name in seconds else None
        columns = ([by_seed[seed] for seed in common] for by_seed in (own, sgd, sam))
        found.append(Row(task, name, settings[name], *columns, time))
    return found


# ---- Text ------------------------------------------------------------------------------------------------------------


def interval(e: Estimate, digits: int = 2) -> str:
    if not np.isfinite([e.value, e.low, e.high]).all():
        return f"{e.value:.{digits}f}"
    return f"{e.value:.{digits}f} ({e.low:.{digits}f} - {e.high:.{digits}f})"


def main_table(found: list[Row]) -> list[str]:
    head = ["contender", "seeds", "lr / decay / rho", "accuracy, %", "gain, points", "R"]
    head += ["of SAM's flattening", "cost", "time", ""]
    lines = []
    for row in (r for r in found if r.setting):
        seeds = f"{len(row.runs)} of {plan.size(row.task, row.contender)[1]}"
        setting = " / ".join(f"{x:g}" for x in row.setting or () if x)
        measured = [""] * 5
        if row.runs:
            sharp = row.sharpness
            measured = [
                f"{np.mean(row.accuracies[0]):.2f}",
                "" if row.contender == "sgd" else interval(row.gain),
                "" if row.contender in ("sgd", "sam") else interval(row.share),
                "" if row.contender == "sgd" else "diverged" if sharp is None else f"{100 * sharp:.0f} %",
                f"{row.cost:.3g}",
            ]
        time = "not measured yet" if row.time is None else interval(row.time)
        lines.append([TITLES[row.contender], seeds, setting, *measured, time, row.verdict])
    untuned = ", ".join(TITLES[row.contender] for row in found if not row.setting)
    missing = ["", f"Not tuned yet: {untuned}."] if untuned else []
    return [*table(head, lines), *missing] if lines else missing[1:]


def fitness(sam: Row) -> str:
    """Whether SAM gains enough on the task to tell how much of it a contender keeps."""
    if len(sam.runs) < 3 or sam.contender != "sam":
        return "SAM's gain is not known yet."
    differences = np.subtract(*sam.accuracies[:2])
    errors = sam.gain.value / (differences.std(ddof=1) / np.sqrt(len(differences)) + 1e-9)
    enough = "as" if sam.gain.value >= 0.5 and errors >= 4 else "NOT as"
    gain = f"SAM gains {interval(sam.gain)} points over SGD, {min(errors, 99):.1f} standard errors"
    return f"{gain}: {enough} the experiment needs (at least 0.5 points and 4 standard errors)."


def tuning_table(task: str, results: plan.Results) -> list[str]:
    """Mean accuracy over the first tuning seeds, by setting."""
    first, more, _ = plan.seeds_of(task)
    lines = []
    for name in CONTENDERS:
        for tried in plan.grids(task, name, results):
            scores = [plan.accuracy(task, name, setting, first, results) for setting in tried]
            if set(scores) == {None}:
                continue
            pairs = len({setting.rho for setting in tried}) == 1
            labels = [f"{s.lr:g} / {s.weight_decay:g}" if pairs else f"{s.rho:g}" for s in tried]
            cells = [f"{label}: {'' if x is None else f'{x:.2f}'}" for label, x in zip(labels, scores, strict=True)]
            found = plan.best(task, name, tried, results)
            choice = "not made yet" if found is None else labels[tried.index(found)]
            edge = ", the edge of the grid" if found in (tried[0], tried[-1]) and not pairs else ""
            lines.append([TITLES[name], "lr / weight decay" if pairs else "rho", "; ".join(cells), choice + edge])
    head = ["contender", "", f"accuracy over {len(first)} seeds", f"best over {len(first) + len(more)}"]
    return table(head, lines) if lines else ["Not begun yet."]


def statistics_lines(by_task: dict[str, list[Row]]) -> list[str]:
    """Which pass should count in BatchNorm's statistics, from the two contenders that differ in that alone."""
    lines = []
    for task, found in by_task.items():
        first, second = (next(r for r in found if r.contender == name) for name in ("quarter", "quarter-second-counts"))
        n = min(len(first.runs), len(second.runs))
        if n < 3:
            lines.append(f"- Task {task}: not measured yet.")
            continue
        difference = resampled(mean_difference, second.accuracies[0][:n], first.accuracies[0][:n])
        lines.append(f"- Task {task}: {interval(difference)} points, {n} seeds.")
    return lines


def shipped(by_task: dict[str, list[Row]]) -> list[str]:
    """What R says over both tasks."""
    lines = []
    for name in CONTENDERS:
        both = [next(r for r in found if r.contender == name) for found in by_task.values()]
        if name == "sam" or CONTENDERS[name].along is None or not all(r.complete for r in both):
            continue
        below = all(r.share.value < 0.7 for r in both)
        accepted = [r.task for r in both if r.verdict.startswith("accepted")]
        where = " and ".join(accepted) or "neither task"
        verdict = "not shipped: R < 0.7 on both tasks" if below else f"accepted on {where}"
        lines.append([TITLES[name], *(f"{r.share.value:.2f}" for r in both), verdict])
    if not lines:
        return ["No contender has all its runs on both tasks yet, so nothing is accepted or rejected."]
    return table(["contender", *(f"R on {task}" for task in by_task), ""], lines)


def page(results: plan.Results, times: dict[str, Any]) -> str:
    """docs/quality.md. Every figure in it is computed from ``results`` and ``times``."""
    by_task = {task: rows(task, results, times) for task in TASKS}
    planned = sum(sum(plan.size(task, name)) for task in TASKS for name in CONTENDERS)
    finished = all(row.complete for found in by_task.values() for row in found)
    processors = Counter(r["processor"] for r in results.values())
    diverged = sum(r["diverged"] for r in results.values())
    machine = times.get("machine")
    made_from = f"the first {len(results)} runs in `bench/results/quality.jsonl`"
    so_far = f"**{len(results)} of some {planned} runs are done.** Figures of rows that are not finished will move."
    where = "; ".join(f"{n} on {name}" for name, n in processors.items())
    lines = [
        "# SAM's accuracy at close to SGD's price",
        "",
        f"Made by `python -m bench.quality report` from {made_from}; do not edit.",
        "",
        "All runs are done." if finished else so_far,
        "",
        *INTRODUCTION.splitlines(),
        "",
        f"Runs by processor: {where}. Diverged: {diverged}.",
        "Time: " + ("not measured yet" if machine is None else ", ".join(f"{k} {v}" for k, v in machine.items())) + ".",
        "",
        "## What the experiment accepts",
        "",
        *shipped(by_task),
    ]
    for task, found in by_task.items():
        lines += ["", f"## Task {task}", "", DESCRIPTIONS[task], "", fitness(found[1]), "", *main_table(found)]
    lines += ["", "![Gain in accuracy over cost](quality/cost.png)", ""]
    lines += ["## Which pass counts in BatchNorm's statistics", "", BATCHNORM, "", *statistics_lines(by_task)]
    lines += ["", "## Tuning", "", "![Tuning curves](quality/tuning.png)"]
    for task in TASKS:
        lines += ["", f"Task {task}, accuracy in percent:", "", *tuning_table(task, results)]
    return "\n".join(lines) + "\n"


INTRODUCTION = """\
A SAM step costs two SGD steps: it makes two passes where SGD makes one. Each contender saves a part of the extra one.
R is the share of SAM's gain over SGD that a contender keeps: mean(accuracy - SGD's) / mean(SAM's accuracy - SGD's).

- Accuracy is the last epoch's, on test images that chose nothing: neither the epoch nor a setting.
- For a seed all contenders have the same training images, initial weights and order of batches.
- SGD tunes its learning rate and weight decay, also with more epochs. SAM tunes its own, then rho over five values.
  The others take SAM's learning rate and weight decay, as anyone who replaces SAM by them would, and tune rho over as
  many values.
- Tuning tries all settings on two fifths of the tuning seeds, then the best two on all. The table's seeds are others.
- "Every k-th step" with SAM's rho and with k times that are values of one grid, and so are 1 and 5 times SAM's rho for
  normalization layers.
- The first pass on 1/4 in the last quarter of the steps was added when the results of the other late contenders were
  known; it was tuned and tested as they were.
- Intervals: 95 %, paired bootstrap over the seeds.
- Sharpness is the mean of L(w + e) - L(w) over training batches, e along the batch's gradient and 0.05 long. "Of SAM's
  flattening" is the share of SAM's reduction of it.
- Cost is passes counted, SGD's = 1: forward, gradients of activations and gradients of weights are a third each. Time
  is the median of the ratios to SGD's time within a round of `python -m bench.quality time`.
- The first pass's batch counts in BatchNorm's statistics, unless a row says otherwise. A single pass always counts.
- Accepted: R at least 0.90 and its lower bound at least 0.75, at least 80 % of SAM's reduction of sharpness, at most
  1.30 of SGD's time (stretch: 1.15, or R at least 0.75 at 1.05). A contender with R under 0.7 on both tasks is not
  shipped.
- Everything is float32 in plain PyTorch on one thread (`bench/quality`); nothing of sam_fast's kernels is in it."""
DESCRIPTIONS = {
    "A": """\
3,000 images of Fashion-MNIST, half of the labels drawn anew at random, 20 epochs, batches of 128. The images are
averaged to 14 x 14 pixels, the network is the demo's (98,682 weights, BatchNorm), and all 10,000 test images
are tested on. With 30 % of the labels a well chosen weight decay seemed to leave SAM little to gain (one seed of a
search before the experiment).""",
    "B": """\
2,000 images with their right labels, 20 epochs, batches of 64, otherwise as task A. What there is to overfit here is
noise in the pixels: Gaussian, of standard deviation 0.5 where white is 1, in the test images too; an image keeps its
noise from epoch to epoch. Candidates without it, 300 to 1,000 clean images and three networks, showed no gain of SAM
worth the name on seeds 100 to 104 (0.1 points with 235 runs of the first of them).""",
}
BATCHNORM = """\
The contender whose first pass sees a quarter of the batch runs twice: its first pass counts, or its second. Accuracy
where the second counts, less accuracy where the first does:"""


# ---- The README ------------------------------------------------------------------------------------------------------

LINES = {
    "late-quarter": "`Schedule(start=0.75, total=steps)`",
    "quarter-late-half": "`Schedule(start=0.5, total=steps)`, `TrainStep(ascent=1 / 4)`",
    "quarter-late-quarter": "`Schedule(start=0.75, total=steps)`, `TrainStep(ascent=1 / 4)`",
}
"""How to write an accepted contender with sam_fast."""


BASIS = ("sgd", "sgd-2x", "sam")


def contrasted(by_task: dict[str, list[Row]]) -> list[list[Row]]:
    """SGD, SGD with as many passes as SAM, SAM, and the contenders that are accepted on all tasks, the cheapest last.

    For each of them its rows, one for each task.
    """
    each = [list(same) for same in zip(*by_task.values(), strict=True)]
    accepted = [same for same in each if all(r.complete and r.verdict.startswith("accepted") for r in same)]
    basis = [same for same in each if same[0].contender in BASIS and all(r.runs for r in same)]
    basis.sort(key=lambda same: BASIS.index(same[0].contender))
    return basis + sorted(accepted, key=lambda same: -same[0].cost)


def readme_table(by_task: dict[str, list[Row]]) -> list[str]:
    lines = []
    for same in contrasted(by_task):
        name = same[0].contender
        title = TITLES[name] if name not in LINES else f"SAM, {TITLES[name]}: {LINES[name]}"
        accuracies = [np.mean(r.accuracies[0]) for r in same]
        times = [r.time.value for r in same if r.time is not None]
        time = f"{np.mean(times):.2f}" if times else ""
        lines.append([title, f"{same[0].cost:.2f}", time, *(f"{a:.1f} %" for a in accuracies)])
    return table(["trained with", "passes", "time", *(SUBJECTS[task] for task in by_task)], lines)


def write(page_path: Path = PAGE, pictures: Path = PICTURES, readme: Path | None = ROOT / "README.md") -> None:
    """Make the page, its pictures, and the README's table."""
    results = plan.load()
    times = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    page_path.write_text(page(results, times))
    by_task = {task: rows(task, results, times) for task in TASKS}
    if readme is not None:
        text = readme.read_text()
        before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
        readme.write_text("\n".join([text[:before], *readme_table(by_task), text[after:]]))
    save(pictures, cost=cost_picture(by_task), tuning=tuning_picture(results), price=price_picture(contrasted(by_task)))
