"""Which steps perturb, and the step counter that checkpoints carry."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import devices

STEP = "sam_step"
"""Entry of every parameter group where steps are counted: the number of second steps so far."""

PATIENCE = 100
"""An optimizer that is deleted after more steps than this, none of which perturbed, gives a warning."""


@dataclass(unsafe_hash=True)  # not frozen: Lightning refuses hyperparameters that are
class Schedule:
    """Which steps perturb; the others are the base optimizer's. Steps are counted from 0.

    A step n perturbs if ``start <= n < stop`` and ``(n - start) % every == 0``. Fewer perturbations want a larger rho:
    docs/quality.md has measurements.

    Args:
        every: perturb every ``every``-th step; at least 1.
        start: the first step that perturbs. A float is a share of ``total``: ``start=0.75`` is the last quarter.
        stop: the first step that no longer perturbs, or a share of ``total``; None: there is none.
        total: how many steps training has; needed for shares. If training ends earlier, it may never reach a start
            given as a share: one warning says so.

    Raises:
        TypeError: an argument is not a number of its type.
        ValueError: an argument is out of range, a share lacks ``total``, or no step lies between start and stop.
    """

    every: int = 1
    start: int | float = 0
    stop: int | float | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("total", 1 if self.total is None else self.total)):
            if not _is_int(value):
                raise TypeError(f"Schedule({name}=) must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"Schedule({name}=) must be at least 1, got {value}")
        for name in ("start", "stop"):
            if isinstance(share := getattr(self, name), float):  # NumPy's float64 is one, which torch.load refuses
                setattr(self, name, float(share))
        first, end = self._step("start", self.start), self._step("stop", self.stop)
        if end is not None and first is not None and first >= end:
            raise ValueError(f"no step is perturbed: start is step {first}, stop is step {end}")

    def _step(self, name: str, value: int | float | None) -> int | None:
        """A bound in steps."""
        if value is None:
            return None
        if isinstance(value, float):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"Schedule({name}=) as a float is a share of total, from 0.0 to 1.0, got {value}")
            if self.total is None:
                raise ValueError(f"Schedule({name}={value}) is a share of the steps: give total= as well")
            return round(value * self.total)
        if not _is_int(value):
            raise TypeError(f"Schedule({name}=) must be an int (a step) or a float (a share of total), got {value!r}")
        if value < 0:
            raise ValueError(f"Schedule({name}=) must be at least 0, got {value}")
        return value

    @property
    def first(self) -> int:
        """The first step that perturbs."""
        return self._step("start", self.start) or 0

    def perturbs(self, step: int) -> bool:
        """Whether a step perturbs."""
        end = self._step("stop", self.stop)
        return step >= self.first and (step - self.first) % self.every == 0 and (end is None or step < end)

    def settled(self, step: int) -> bool:
        """Whether from this step on all steps of training are alike."""
        end = self._step("stop", self.stop)
        if end is not None and step >= end:
            return True
        to_the_end = end is None or (self.total is not None and end >= self.total)
        return to_the_end and self.every == 1 and step >= self.first


# Lightning's save_hyperparameters() writes a schedule into checkpoints, and torch.load refuses unknown classes.
torch.serialization.add_safe_globals([Schedule])


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_schedule(schedule: Any) -> None:
    """Raise TypeError unless ``schedule`` is a Schedule or None."""
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a sam_fast.Schedule or None, got {schedule!r}")


def steps_taken(param_groups: Sequence[dict[str, Any]]) -> int:
    """The number of second steps so far. It is kept in the groups, so that a resumed run follows the same schedule."""
    return max((int(group.get(STEP, 0)) for group in param_groups), default=0)


def start_counter(param_groups: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]] = ()) -> None:
    """Put the counter into all groups: torch.distributed.checkpoint loads only entries that are there. It goes on from
    that of ``earlier`` groups.
    """
    steps = steps_taken([*earlier, *param_groups])
    for group in param_groups:
        group.setdefault(STEP, steps)


def count_step(param_groups: Sequence[dict[str, Any]]) -> int:
    """Count a second step. Returns its number, the first one's being 0."""
    step = steps_taken(param_groups)
    for group in param_groups:
        group[STEP] = step + 1
    return step


@dataclass
class ScheduleWatch:
    """Warns once if no step was perturbed under a schedule, and once if a captured graph cannot follow it."""

    schedule: Schedule
    steps: int = 0
    quiet: bool = False  # there was a perturbation, or a warning
    captured: bool = False

    def count(self, step: int, perturbed: bool) -> None:
        """Note a step, and whether it was perturbed."""
        resumed = self.steps == 0 and step > self.schedule.first  # an earlier run has perturbed
        self.steps += 1
        self.quiet = self.quiet or perturbed or resumed
        if step + 1 == self.schedule.total:
            self._warn(f"none of its {self.schedule.total} steps")

    def look_for_capture(self, step: int, on: Iterable[torch.device]) -> None:
        """Note a step, which may have been captured on one of these devices."""
        if self.captured or self.schedule.settled(step) or not any(map(devices.is_capturing, on)):
            return
        self.captured = True
        does = "perturbs" if self.schedule.perturbs(step) else "does not perturb"
        warnings.warn(
            f"step {step} was captured in a graph, and {self.schedule} counts steps on the host: each replay does what "
            f"this step does, which {does}. Capture a graph for each kind of step, or once all steps are alike",
            RuntimeWarning,
            stacklevel=2,
        )

    def warn_at_the_end(self) -> None:
        """Called when the optimizer is deleted."""
        if self.steps > PATIENCE:
            self._warn(f"none of the {self.steps} steps there were")

    def _warn(self, which: str) -> None:
        if not self.quiet:
            self.quiet = True
            warnings.warn(
                f"{self.schedule} has perturbed {which}: this was training with the base optimizer alone. Check start "
                "and total",
                RuntimeWarning,
                stacklevel=2,
            )
