"""The project's speed targets, each as a line: what was wanted, what was measured, met or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pandas as pd
from scipy.stats import gmean

from bench.models import LARGE, LARGEST, MODELS
from bench.peers import BEST_PEERS, PEER_FOREACH, PUBLIC_LOOP, REFERENCE
from bench.records import Record, Run, median
from bench.training import ASCENT, EVERY, PRICE, SGD_ONCE, UNPERTURBED

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
UNITS = {"x": 1.0, "%": 1e2, "ms": 1e3, "us": 1e6, "launches": 1.0}

Values = Callable[[Run], pd.Series]
"""What finds figures in a run, by case; none if one of them is missing."""


def of(group: str, cases: Iterable[str] | None, value: Callable[[Record], float | None]) -> Values:
    """A figure of each of the group's records; of these cases, all of which must be there. What is None is left out."""

    def find(run: Run) -> pd.Series:
        records = run.find(group)
        wanted = records if cases is None else cases if records.keys() >= set(cases) else ()
        return pd.Series({case: value(records[case]) for case in wanted}, dtype=float).dropna()

    return find


def faster(group: str, cases: Iterable[str], baselines: Sequence[str] = (REFERENCE,)) -> Values:
    """How many times faster than the best of the baselines. All must be there but pytorch_optimizer's foreach: it is
    slower than its loop, and not measured everywhere."""

    def ratio(r: Record) -> float | None:
        there = set(baselines) & r.rounds.keys()
        return r.faster_than_best(there) if there and set(baselines) - there <= {PEER_FOREACH} else None

    return of(group, cases, ratio)


def share(group: str, cases: Iterable[str]) -> Values:
    return of(group, cases, lambda r: median(r.shares()).value if r.shares() else None)


def apart(run: Run) -> pd.Series:
    """How far the ratios of a second run were from this one's."""
    return pd.Series(run.agreement.get("apart"), dtype=float)


def seconds(group: str, case: str) -> Values:
    return of(group, [case], lambda r: r.seconds().value)


def of_sgd(name: str) -> Values:
    """Time over SGD's, in batches of 128."""
    return of(PRICE, ["ConvNet, batch 128"], lambda r: r.faster_than(name, SGD_ONCE).value)


WITHOUT_LARGEST = [name for name in MODELS if name != LARGEST]
BIG = [name for name in LARGE if name != "resnet50"]
"""80M parameters and more."""
FIRST, STEP, ADAMW = "first_step, SGD", "optimizer step, SGD", "optimizer step, AdamW"
THAN, WHOLE = "times faster than the reference", "whole step with"
HOST = "host time of first_step for 161 parameters under 60 us, in a loop of its own"
host_time = seconds("first_step, host time, in a loop", "161 x 8")
straw = of("optimizer step, reference and public loop", None, lambda r: 1 / r.faster_than(PUBLIC_LOOP).value - 1)
# the interval's lower end: no slower beyond the noise
no_slower = of(UNPERTURBED, None, lambda r: r.faster_than("sam_fast", SGD_ONCE).low)
than_peers = faster(STEP, MODELS, BEST_PEERS)
foreach = faster(FIRST, ["resnet50"], [PEER_FOREACH])
launches = of("second_step, SGD", ["resnet50"], lambda r: r.facts.get("launches", {}).get("sam_fast"))

ON_THE_CPU: list[tuple[str, str, str, Values]] = [
    (f"first_step at least 3.5 {THAN} on every set", ">= 3.5 x", "least", faster(FIRST, MODELS)),
    ("first_step at least 4.5 times faster, geometric mean", ">= 4.5 x", "mean", faster(FIRST, MODELS)),
    (f"{WHOLE} SGD at least 4 {THAN}, geometric mean", ">= 4 x", "mean", faster(STEP, MODELS)),
    (f"{WHOLE} SGD at least 3 times faster on every set", ">= 3 x", "least", faster(STEP, MODELS)),
    (f"{WHOLE} SGD at least twice as fast as the best peer, geometric mean", ">= 2 x", "mean", than_peers),
    ("the same on every set", ">= 2 x", "least", than_peers),
    (f"{WHOLE} AdamW at least 3 {THAN}, geometric mean", ">= 3 x", "mean", faster(ADAMW, WITHOUT_LARGEST)),
    ("the same on every set", ">= 3 x", "least", faster(ADAMW, WITHOUT_LARGEST)),
    ("SGD: at least 85 % of the measured bandwidth from 25M parameters on", ">= 85 %", "least", share(STEP, LARGE)),
    ("AdamW: the same", ">= 85 %", "least", share(ADAMW, [name for name in LARGE if name != LARGEST])),
    ("SAM with ascent=1/4 at most 1.35 of SGD's time, batches of 128", "<= 1.35 x", "most", of_sgd(ASCENT)),
    ("SAM with every=4 at most 1.30 of SGD's time, batches of 128", "<= 1.30 x", "most", of_sgd(EVERY)),
    ("a step that does not perturb no slower than SGD(fused=True), beyond the noise", "<= 1 x", "most", no_slower),
    (HOST, "<= 60 us", "mean", host_time),
    ("import adds under 50 ms", "<= 50 ms", "mean", seconds("import sam_fast after import torch", "fresh process")),
    ("the reference at most 10 % slower than the public implementation's operations", "<= 10 %", "most", straw),
    ("two runs agree: every ratio to the reference within 15 %", "<= 15 %", "most", apart),
]
"""What is wanted, the bound, which of the figures must keep it ("least", "most", or their geometric "mean")."""
ON_A_GPU: list[tuple[str, str, str, Values]] = [
    (f"first_step on resnet50 at least 10 {THAN}", ">= 10 x", "mean", faster(FIRST, ["resnet50"])),
    ("the same at least 3 times faster than pytorch_optimizer's foreach SAM", ">= 3 x", "mean", foreach),
    (f"whole step on resnet50 at least 10 {THAN}", ">= 10 x", "mean", faster(STEP, ["resnet50"])),
    ("first_step at 90 % of a copy's rate from 80M parameters on", ">= 90 %", "least", share(FIRST, BIG)),
    ("whole step at 90 % of the same", ">= 90 %", "least", share(STEP, BIG)),
    (HOST, "<= 60 us", "mean", host_time),
    ("second_step is one launch", "<= 1 launches", "mean", launches),
]


def on_the_cpu(run: Run) -> list[dict[str, str]]:
    """Every target: what was wanted, what was measured (empty where nothing was), and whether it is met."""
    return [{"target": target, **_judged(values(run), bound, which)} for target, bound, which, values in ON_THE_CPU]


def on_a_gpu(run: Run | None) -> list[dict[str, str]]:
    found = run or Run({})
    return [{"target": f"GPU: {t}", **_judged(values(found), bound, which)} for t, bound, which, values in ON_A_GPU]


def _judged(values: pd.Series, bound: str, which: str) -> dict[str, str]:
    if values.empty:
        return {"measured": "", "": NOT_MEASURED}
    sign, wanted, unit = bound.split()
    where = {"least": values.idxmin(), "most": values.idxmax()}.get(which)
    value = UNITS[unit] * float(values[where] if where else gmean(values))
    met = value >= float(wanted) if sign == ">=" else value <= float(wanted)
    text = f"{value:.2f}x" if unit == "x" else f"{value:.0f} {unit}"
    return {"measured": f"{text}, {which}: {where}" if where else text, "": MET if met else NOT_MET}
