"""The project's speed targets, each as a line: what was wanted, what was measured, met or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.models import LARGE, LARGEST, MODELS
from bench.peers import BEST_PEERS, PEER_FOREACH, PUBLIC_LOOP, REFERENCE
from bench.records import Record, Run, geometric_mean
from bench.training import ASCENT, EVERY, PRICE, SGD_ONCE, UNPERTURBED

HOST, ALONE = "host time of first_step for 161 parameters under 60 us", ("first_step, host time, alone", "161 x 8")
MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
UNITS = {"x": 1.0, "%": 1e2, "ms": 1e3, "us": 1e6}

Found = tuple[float, str] | None
"""A value and where it was found; None where it was not measured."""


@dataclass(frozen=True)
class Line:
    target: str
    measured: str
    state: str


def _line(target: str, bound: str, found: Found) -> Line:
    """``bound``: as ``>= 3.5 x`` or ``<= 50 ms``."""
    if found is None:
        return Line(target, "", NOT_MEASURED)
    sign, wanted, unit = bound.split()
    value, where = UNITS[unit] * found[0], found[1]
    met = value >= float(wanted) if sign == ">=" else value <= float(wanted)
    text = f"{value:.2f}x" if unit == "x" else f"{value:.0f} {unit}"
    return Line(target, f"{text}, {where}" if where else text, MET if met else NOT_MET)


def _all(run: Run, group: str, names: Iterable[str]) -> list[Record]:
    """The group's records of these models; none if one is missing."""
    found = [r for name in names if (r := run.get(group, name)) is not None]
    return found if len(found) == len(list(names)) else []


def _ratios(records: list[Record], baselines: tuple[str, ...] = (REFERENCE,)) -> dict[str, float]:
    """By case, how many times faster than the fastest of the baselines; empty if one was not measured."""
    complete = all(set(baselines) - set(r.rounds) <= {PEER_FOREACH} for r in records)
    return {r.case: r.faster_than(r.fastest(baselines)).value for r in records} if complete else {}


def _mean(ratios: dict[str, float]) -> Found:
    return (geometric_mean(ratios.values()), "") if ratios else None


def _least(values: dict[str, float]) -> Found:
    return min((value, f"least: {case}") for case, value in values.items()) if values else None


def _most(values: dict[str, float]) -> Found:
    return max((value, f"most: {case}") for case, value in values.items()) if values else None


def _share(records: list[Record]) -> Found:
    return _least({r.case: share.value for r in records if (share := r.share_of_copy()) is not None})


def _seconds(run: Run, group: str, case: str) -> Found:
    record = run.get(group, case)
    return (record.seconds().value, "") if record else None


def lines(cpu: Run, gpu: Run | None = None) -> list[Line]:
    """Every target."""
    first, sgd = (_all(cpu, group, MODELS) for group in ("first_step, SGD", "optimizer step, SGD"))
    adamw = _all(cpu, "optimizer step, AdamW", [name for name in MODELS if name != LARGEST])
    first_ratios, sgd_ratios, adamw_ratios, best = (
        _ratios(first),
        _ratios(sgd),
        _ratios(adamw),
        _ratios(sgd, BEST_PEERS),
    )
    batch_128 = [r for r in cpu.find(PRICE) if r.case.endswith("batch 128")]
    cheap = {name: _most({r.case: r.faster_than(name, SGD_ONCE).value for r in batch_128}) for name in (ASCENT, EVERY)}
    # the interval's lower end: no slower beyond the noise
    unperturbed = _most({r.case: r.faster_than("sam_fast", SGD_ONCE).low for r in cpu.find(UNPERTURBED)})
    straw = cpu.find("optimizer step, reference and public loop")
    loop = _most({r.case: 1 / r.faster_than(PUBLIC_LOOP).value - 1 for r in straw})
    imported = _seconds(cpu, "import sam_fast after import torch", "fresh process")
    apart = (cpu.agreement["largest"], f"most: {cpu.agreement['where']}") if cpu.agreement else None
    large = [_share([r for r in records if r.case in LARGE]) for records in (sgd, adamw)]
    faster, step = "times faster than the reference", "whole step with"
    found: list[tuple[str, str, Found]] = [
        (f"first_step at least 3.5 {faster} on every set", ">= 3.5 x", _least(first_ratios)),
        ("first_step at least 4.5 times faster, geometric mean", ">= 4.5 x", _mean(first_ratios)),
        (f"{step} SGD at least 4 {faster}, geometric mean", ">= 4 x", _mean(sgd_ratios)),
        (f"{step} SGD at least 3 times faster on every set", ">= 3 x", _least(sgd_ratios)),
        (f"{step} SGD at least twice as fast as the best of the peers, geometric mean", ">= 2 x", _mean(best)),
        ("the same on every set", ">= 2 x", _least(best)),
        (f"{step} AdamW at least 3 {faster}, geometric mean", ">= 3 x", _mean(adamw_ratios)),
        ("the same on every set", ">= 3 x", _least(adamw_ratios)),
        ("SGD: at least 85 % of the measured bandwidth from 25M parameters on", ">= 85 %", large[0]),
        ("AdamW: the same", ">= 85 %", large[1]),
        ("SAM with ascent=1/4 at most 1.35 of SGD's time, batches of 128", "<= 1.35 x", cheap[ASCENT]),
        ("SAM with every=4 at most 1.30 of SGD's time, batches of 128", "<= 1.30 x", cheap[EVERY]),
        ("a step that does not perturb no slower than SGD(fused=True), beyond the noise", "<= 1 x", unperturbed),
        (f"{HOST}, in a loop of its own", "<= 60 us", _seconds(cpu, *ALONE)),
        ("import adds under 50 ms", "<= 50 ms", imported),
        ("the reference at most 10 % slower than the public implementation's operations", "<= 10 %", loop),
        ("two runs agree: every ratio to the reference within 15 %", "<= 15 %", apart),
    ]
    return [_line(*target) for target in (*found, *_on_gpu(gpu or Run({})))]


def _on_gpu(run: Run) -> list[tuple[str, str, Found]]:
    """The targets on a GPU, out of a run with --device cuda."""
    first, second, step = (run.get(f"{p}, SGD", "resnet50") for p in ("first_step", "second_step", "optimizer step"))
    launches = second.facts.get("launches", {}).get("sam_fast") if second else None
    big = [name for name in LARGE if name != "resnet50"]  # 80M parameters and more

    def ratio(record: Record | None, baseline: str = REFERENCE) -> Found:
        return (record.faster_than(baseline).value, "") if record and baseline in record.rounds else None

    def share(group: str) -> Found:
        return _share(_all(run, group, big))

    return [
        ("GPU: first_step on resnet50 at least 10 times faster than the reference", ">= 10 x", ratio(first)),
        ("GPU: at least 3 times faster than pytorch_optimizer's foreach SAM", ">= 3 x", ratio(first, PEER_FOREACH)),
        ("GPU: whole step on resnet50 at least 10 times faster than the reference", ">= 10 x", ratio(step)),
        ("GPU: first_step at 90 % of a copy's rate from 80M parameters on", ">= 90 %", share("first_step, SGD")),
        ("GPU: whole step at 90 % of the same", ">= 90 %", share("optimizer step, SGD")),
        (f"GPU: {HOST}, in a loop of its own", "<= 60 us", _seconds(run, *ALONE)),
        ("GPU: second_step is one launch", "<= 1 x", (launches, "launches") if launches else None),
    ]
