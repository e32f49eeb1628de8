"""The figures that are computed from a run's rounds. pandas and scipy may be missing where a GPU is only measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd
from scipy.stats import binom

from bench.records import Record, Run

COLUMNS = ["group", "case", "contender", "target", "yardstick", "elements", "unit", "launches"]
COLUMNS += ["seconds", "noise", "ratio", "low", "high", "rate", "share"]


class Estimate(NamedTuple):
    """A median and the 95 % confidence interval of it."""

    value: float
    low: float
    high: float


def median(values: Sequence[float]) -> Estimate:
    """With the interval from order statistics (binomial): no assumption about how the noise is distributed."""
    ordered = sorted(values)
    rank = max(int(binom.ppf(0.025, len(ordered), 0.5)), 1)
    return Estimate(statistics.median(ordered), ordered[rank - 1], ordered[-rank])


def figures(run: Run, yardstick_of: Callable[[Record], str | None]) -> pd.DataFrame:
    """A row for each contender of each record, with what the record says of it and:

    - seconds: their median (of bytes, where these are the unit); noise: half the interval's width, relative
    - ratio, low, high: median and interval of the quotient of its time and the yardstick's in the same round, since
      what slows the whole machine for a while hits both; without a yardstick, of its time
    - rate: bytes that must move, per second; share: of the bandwidth measured in the same round; both only where
      memory is a bound
    """
    rows = []
    for record in run.records:
        yardstick = yardstick_of(record)
        for name, rounds in record.rounds.items():
            seconds, low, high = median(rounds)
            row = {"contender": name, "yardstick": yardstick, "seconds": seconds, "noise": (high - low) / (2 * seconds)}
            divisors = record.rounds[yardstick] if yardstick else [1.0] * len(rounds)
            row["ratio"], row["low"], row["high"] = median([a / b for a, b in zip(rounds, divisors, strict=True)])
            if shares := record.shares(name):
                row |= {"rate": (record.bytes_moved or 0) / seconds, "share": statistics.median(shares)}
            row |= {"unit": record.facts.get("unit", "s"), "launches": record.facts.get("launches", {}).get(name)}
            rows.append(vars(record) | row)
    return pd.DataFrame(rows, columns=COLUMNS)
