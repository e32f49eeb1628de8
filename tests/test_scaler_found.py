"""How a step finds the gradient scaler that called it, whatever lies between the two."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import same_bits
from scaled_runs import BASES, INF, Run, batch_of, scaler_with
from torch.optim import lr_scheduler

from sam_fast import SAM, amp


class Subclass(torch.amp.GradScaler):
    """With a step of its own."""

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        return super().step(optimizer, *args, **kwargs)


def scheduled(optimizer: SAM, steps: list[float]) -> None:
    lr_scheduler.ConstantLR(optimizer)


def hooked(optimizer: SAM, steps: list[float]) -> None:
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.register_step_post_hook(lambda *_: None)


def patched(optimizer: SAM, steps: list[float]) -> None:
    step = optimizer.step

    def counting(*args: Any, **kwargs: Any) -> Any:
        steps.append(1.0)
        return step(*args, **kwargs)

    optimizer.step = counting  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, Subclass])
@pytest.mark.parametrize("wrap", [scheduled, hooked, patched])
def test_the_scaler_is_found_behind_what_wraps_the_step(
    wrap: Callable[[SAM, list[float]], None], kind: type[torch.amp.GradScaler]
) -> None:
    run = Run(BASES["adamw-fused"], scaler_with(kind=kind))
    wrap(run.optimizer, [])
    run.step(0)
    with torch.profiler.profile():
        run.step(1, first=INF)
    assert run.scaler.get_scale() == 2.0**11


def test_two_optimizers_share_a_scaler() -> None:
    scaler = scaler_with()
    runs = [Run(BASES["sgd"], scaler) for _ in range(2)]
    for run, plant in zip(runs, (INF, None), strict=True):
        run.backward(*batch_of(0), plant)
        run.optimizer.first_step(zero_grad=True)
        run.backward(*batch_of(0), None)
    before = runs[0].weights
    for run in runs:
        scaler.step(run.optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert same_bits(runs[0].weights, before)
    assert not same_bits(runs[1].weights, before)


def test_the_default_dtype_is_not_that_of_what_a_scaler_finds() -> None:
    """Of a base optimizer that steps by itself."""
    run = Run({"base_optimizer": torch.optim.RMSprop}, scaler_with())
    torch.set_default_dtype(torch.float64)
    try:
        run.step(0)
    finally:
        torch.set_default_dtype(torch.float32)


class Foreign:
    """Gives the optimizer its tensors, as a scaler does, and is none."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


class Renamed(Foreign, torch.amp.GradScaler):
    """A scaler that keeps its books elsewhere."""

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(("kind", "words"), [(Foreign, "not called by"), (Renamed, "_per_optimizer_states")])
def test_a_scaler_that_cannot_be_told_gets_one_warning_and_still_no_update(
    kind: type[Foreign], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amp, "_warned", set())
    run, foreign = Run(BASES["adamw-fused"]), kind()
    before = run.weights
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for plant in (INF, INF, None):
            run.backward(*batch_of(0), plant)
            run.optimizer.first_step(zero_grad=True)
            run.backward(*batch_of(0), None)
            foreign.step(run.optimizer)
            run.optimizer.zero_grad()
            assert same_bits(run.weights, before) is (plant is not None)
    assert [w.category for w in caught] == [RuntimeWarning]
    assert words in str(caught[0].message)
