"""Which runs there are and in which order, and the file of their results that a stopped experiment goes on from."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bench.machine import ROOT
from bench.quality.contenders import CONTENDERS
from bench.quality.tasks import TASKS
from bench.quality.train import Run

RESULTS = ROOT / "bench" / "results" / "quality.jsonl"
KEPT = 2
"""Settings that are tried on all tuning seeds, of those tried on the first ones."""

Results = dict[Run, dict[str, Any]]


class Setting(NamedTuple):
    lr: float
    weight_decay: float
    rho: float


def run_of(task: str, contender: str, setting: Setting, seed: int) -> Run:
    return Run(task, contender, *setting, seed)


def seeds_of(task: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The seeds that tuning tries every setting on, those that it tries the best on as well, and those of the comparison."""
    n = TASKS[task].repeats
    return tuple(range(100, 100 + 2 * n)), tuple(range(100 + 2 * n, 100 + 5 * n)), tuple(range(20 * n))


# ---- Tuning ----------------------------------------------------------------------------------------------------------------------------------


def grid(task: str, contender: str, results: Results) -> list[Setting] | None:
    """The settings that tuning tries: learning rates and weight decays for SGD, radii for the others, which take SGD's choice. None: not made yet."""
    if CONTENDERS[contender].along is None:
        return [Setting(lr, decay, 0.0) for lr in TASKS[task].lrs for decay in TASKS[task].decays]
    sgd = chosen(task, "sgd", results)
    return None if sgd is None else [sgd._replace(rho=rho) for rho in CONTENDERS[contender].rhos]


def accuracy(task: str, contender: str, setting: Setting, seeds: tuple[int, ...], results: Results) -> float | None:
    """The mean over the seeds, in percent; None unless all of them have run."""
    found = [results.get(run_of(task, contender, setting, seed)) for seed in seeds]
    return None if None in found else mean(r["accuracy"] for r in found if r is not None)


def best(task: str, contender: str, settings: list[Setting], seeds: tuple[int, ...], number: int, results: Results) -> list[Setting] | None:
    """The ``number`` most accurate settings; None unless all have run."""
    scores = {setting: accuracy(task, contender, setting, seeds, results) for setting in settings}
    if None in scores.values():
        return None
    return sorted(settings, key=lambda setting: -(scores[setting] or 0.0))[:number]


def kept(task: str, contender: str, results: Results) -> list[Setting] | None:
    settings = grid(task, contender, results)
    return None if settings is None else best(task, contender, settings, seeds_of(task)[0], KEPT, results)


def chosen(task: str, contender: str, results: Results) -> Setting | None:
    """The setting that is best on all tuning seeds of those that were kept; None while that is not known."""
    settings, (first, more, _) = kept(task, contender, results), seeds_of(task)
    found = None if settings is None else best(task, contender, settings, first + more, 1, results)
    return None if found is None else found[0]


def tuning(task: str, contender: str, results: Results) -> Iterator[Run]:
    """Each run is to be in ``results`` before the next is asked for, as in ``plan``."""
    first, more, _ = seeds_of(task)
    for seed in first:
        for setting in grid(task, contender, results) or []:
            yield run_of(task, contender, setting, seed)
    for seed in more:
        for setting in kept(task, contender, results) or []:
            yield run_of(task, contender, setting, seed)


# ---- The order -------------------------------------------------------------------------------------------------------------------------------

URGENT = ("sgd", "sam", "quarter", "every4", "previous", "late-quarter")


def plan(results: Results) -> Iterator[Run]:
    """All runs, the most informative first: the urgent contenders with half of the seeds, the others, then the other half.

    The runs that come next depend on earlier results: whoever takes a run from here adds its result to ``results`` before taking another.
    """
    later = tuple(name for name in CONTENDERS if name not in URGENT)
    for names, half in ((URGENT, 0), (later, 0), (tuple(CONTENDERS), 1)):
        for task in TASKS:
            seeds = seeds_of(task)[2]
            for name in names:
                yield from tuning(task, name, results)
                setting = chosen(task, name, results)
                assert setting is not None
                yield from (run_of(task, name, setting, seed) for seed in seeds if (seed >= len(seeds) // 2) == half)


def size(task: str, contender: str) -> tuple[int, int]:
    """How many runs the plan has for it: to tune, and with the chosen setting."""
    settings = len(CONTENDERS[contender].rhos)
    if CONTENDERS[contender].along is None:
        settings = len(TASKS[task].lrs) * len(TASKS[task].decays)
    first, more, final = seeds_of(task)
    return settings * len(first) + KEPT * len(more), len(final)


# ---- The file --------------------------------------------------------------------------------------------------------------------------------


def load(path: Path = RESULTS) -> Results:
    """The finished runs of a file of JSON lines. What a stop cut off in the last line is no finished run."""
    results: Results = {}
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            record = json.loads(line)
            results[Run(**{f.name: record.pop(f.name) for f in fields(Run)})] = record
    return results


class Writer:
    """Appends results to a file, a line each, at once. One process at a time.

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
