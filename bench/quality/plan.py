"""Which runs there are, in which order, and the file of their results, from which a stopped experiment goes on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bench.quality.contenders import CONTENDERS
from bench.quality.tasks import TASKS
from bench.quality.train import Run
from bench.records import ROOT

RESULTS = ROOT / "bench" / "results" / "quality.jsonl"
KEPT = 2
"""How many of the settings that were tried on the first tuning seeds are tried on all of them."""

Results = dict[Run, dict[str, Any]]


class Setting(NamedTuple):
    lr: float
    weight_decay: float
    rho: float


def run_of(task: str, contender: str, setting: Setting, seed: int) -> Run:
    return Run(task, contender, *setting, seed)


def seeds_of(task: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The seeds that tuning tries all settings on, those that it tries the best on as well, and the comparison's."""
    n = TASKS[task].repeats
    return tuple(range(100, 100 + 2 * n)), tuple(range(100 + 2 * n, 100 + 5 * n)), tuple(range(20 * n))


# ---- Tuning ----------------------------------------------------------------------------------------------------------


def radii(task: str, contender: str) -> tuple[float, ...]:
    """The radii that tuning tries."""
    return tuple(round(TASKS[task].radius * rho, 6) for rho in CONTENDERS[contender].rhos)


def grids(task: str, contender: str, results: Results) -> list[list[Setting]]:
    """The settings that tuning tries, one list after the other, as far as earlier searches have determined them.

    SGD, also with more epochs, searches learning rates and weight decays. SAM does too, with its middle radius, then
    searches radii. The others take SAM's learning rate and weight decay, and search radii.
    """
    pairs = [(lr, decay) for lr in TASKS[task].lrs for decay in TASKS[task].decays]
    rhos, sam_rhos = radii(task, contender), radii(task, "sam")
    if CONTENDERS[contender].along is None:
        return [[Setting(*pair, 0.0) for pair in pairs]]
    base = [Setting(*pair, sam_rhos[len(sam_rhos) // 2]) for pair in pairs]
    found = best(task, "sam", base, results)
    searched = [[found._replace(rho=rho) for rho in rhos]] if found else []
    return [base, *searched] if contender == "sam" else searched


def accuracy(task: str, contender: str, setting: Setting, seeds: tuple[int, ...], results: Results) -> float | None:
    """The mean over the seeds, in percent; None unless all of them have run."""
    found = [results.get(run_of(task, contender, setting, seed)) for seed in seeds]
    return None if None in found else mean(r["accuracy"] for r in found if r is not None)


def ranked(task: str, name: str, tried: list[Setting], seeds: tuple[int, ...], results: Results) -> list[Setting]:
    """The settings, the most accurate first; none unless all have run."""
    scores = {setting: accuracy(task, name, setting, seeds, results) for setting in tried}
    return [] if None in scores.values() else sorted(tried, key=lambda setting: -(scores[setting] or 0.0))


def kept(task: str, contender: str, tried: list[Setting], results: Results) -> list[Setting]:
    return ranked(task, contender, tried, seeds_of(task)[0], results)[:KEPT]


def best(task: str, contender: str, tried: list[Setting], results: Results) -> Setting | None:
    """Of the settings that were kept, the one that is best on all tuning seeds; None while that is not known."""
    first, more, _ = seeds_of(task)
    found = ranked(task, contender, kept(task, contender, tried, results), first + more, results)
    return found[0] if found else None


def chosen(task: str, contender: str, results: Results) -> Setting | None:
    """The setting that the comparison uses; None while tuning has not finished."""
    searched = grids(task, contender, results)
    finished = len(searched) == (2 if contender == "sam" else 1)
    return best(task, contender, searched[-1], results) if finished else None


def tuning(task: str, contender: str, results: Results) -> Iterator[Run]:
    """The runs of a contender's tuning. Add each to ``results`` before taking the next, as with :func:`plan`."""
    first, more, _ = seeds_of(task)
    for i in range(2 if contender == "sam" else 1):
        tried = grids(task, contender, results)[i]
        for seeds, narrow in ((first, False), (more, True)):
            for setting in kept(task, contender, tried, results) if narrow else tried:
                yield from (run_of(task, contender, setting, seed) for seed in seeds)


# ---- The order -------------------------------------------------------------------------------------------------------

URGENT = ("sgd", "sam", "quarter", "every4", "previous", "late-quarter")


def plan(results: Results, tasks: Sequence[str] = tuple(TASKS)) -> Iterator[Run]:
    """All runs of the tasks: half of the seeds for the urgent contenders, then for the others, then the other half.

    What comes next depends on earlier results: add a run's result to ``results`` before taking another run.
    """
    later = tuple(name for name in CONTENDERS if name not in URGENT)
    for names, half in ((URGENT, 0), (later, 0), (tuple(CONTENDERS), 1)):
        for name in names:
            for task in tasks:
                yield from tuning(task, name, results)
                setting, seeds = chosen(task, name, results), seeds_of(task)[2]
                assert setting is not None
                yield from (run_of(task, name, setting, seed) for seed in seeds if (seed >= len(seeds) // 2) == half)


def size(task: str, contender: str) -> tuple[int, int]:
    """The number of runs to tune it (at most: SAM's two searches can share runs), and with the chosen setting."""
    first, more, final = seeds_of(task)
    pairs, rhos = len(TASKS[task].lrs) * len(TASKS[task].decays), len(CONTENDERS[contender].rhos)
    searches = [pairs] if CONTENDERS[contender].along is None else [rhos]
    if contender == "sam":
        searches = [pairs, rhos - 1]
    return sum(n * len(first) + KEPT * len(more) for n in searches), len(final)


# ---- The file --------------------------------------------------------------------------------------------------------


def load(path: Path = RESULTS) -> Results:
    """The finished runs in a file of JSON lines. A last line that was cut off is not one."""
    results: Results = {}
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            record = json.loads(line)
            results[Run(**{f.name: record.pop(f.name) for f in fields(Run)})] = record
    return results


class Writer:
    """Appends each result to a file as a line, and sees that it is on disk. One process at a time.

    Raises:
        SystemExit: another process writes to the file.
    """

    def __init__(self, path: Path = RESULTS) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"{path}: another process is adding runs to it") from None
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)

    def add(self, run: Run, result: dict[str, Any]) -> None:
        self.file.write((json.dumps(asdict(run) | result) + "\n").encode())
        self.file.flush()
        os.fsync(self.file.fileno())
