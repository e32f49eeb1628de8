"""Schedules where loops, checkpoints and warnings are not those of the guide."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import give, make_params, same_bits, values
from test_schedule import batches, guarded, network
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.functional import cross_entropy

from sam_fast import SAM, Schedule
from sam_fast.schedule import STEP

NEVER = Schedule(start=1000)


def counted(model: nn.Module) -> int:
    """How many batches are in the running statistics."""
    return int(model[1].num_batches_tracked)  # type: ignore[index]


# ---- Statistics, random state, casts in steps that do not perturb ----------------------------------------------------


@pytest.mark.parametrize("flatten", [False, True])
def test_gradients_of_zeros_are_no_first_pass(flatten: bool) -> None:
    """``model.zero_grad(set_to_none=False)`` writes them, and nothing tells SAM."""
    model = network()
    optimizer = SAM(model.parameters(), schedule=NEVER, flatten=flatten, lr=0.1)
    for x, y in batches(3):
        model.zero_grad(set_to_none=False)
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            cross_entropy(model(x), y).backward()
        optimizer.second_step()
    assert counted(model) == 3


def test_whether_a_pass_left_gradients_is_asked_of_the_small_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding of 33M elements took three times as long to look at as the step."""
    looked_at = []
    monkeypatch.setattr(Tensor, "any", lambda grad: looked_at.append(grad.numel()) or bool((grad != 0).sum()))
    weights = make_params([1000, 10, 4])
    optimizer = SAM(weights, schedule=NEVER, lr=0.1)
    for p, value in zip(weights, (1.0, 1.0, 0.0), strict=True):
        p.grad = torch.full_like(p, value)
    optimizer.first_step()
    assert looked_at == [4, 10]


def test_a_first_pass_that_was_not_needed_counts_once_without_first_step() -> None:
    model = network()
    optimizer = SAM(model.parameters(), schedule=NEVER, lr=0.1)
    for x, y in batches(3):
        with optimizer.first_pass(model):
            cross_entropy(model(x), y).backward()
        optimizer.zero_grad()
        with optimizer.second_pass(model):
            cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
    assert counted(model) == 3


def test_a_closure_for_the_second_pass_is_the_only_one_where_no_first_is_needed() -> None:
    """closure="second" asks for gradients in the steps that perturb only."""
    model, calls = network(), []
    optimizer = SAM(model.parameters(), schedule=Schedule(every=2), closure="second", lr=0.1)
    for x, y in batches(4):

        def closure(x: Any = x, y: Any = y) -> torch.Tensor:
            calls.append(optimizer.perturbed)
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        if optimizer.needs_first_pass:
            with pytest.raises(RuntimeError, match="no new ones"):
                optimizer.step(closure)
            closure()
        optimizer.step(closure)
        optimizer.zero_grad()
    assert calls == [False, True, False, False, True, False]
    assert counted(model) == 4


def test_a_closure_that_is_called_once_does_not_replay() -> None:
    weight, seen = nn.Parameter(torch.ones(16)), []
    optimizer = SAM([weight], schedule=Schedule(every=3), lr=0.1)

    def closure() -> torch.Tensor:
        seen.append(nn.functional.dropout(torch.ones(16)))
        loss = (weight * seen[-1]).sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure, replay_rng=True)
        optimizer.zero_grad()
    assert torch.equal(seen[0], seen[1])  # both passes of the step that perturbs
    assert not torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_autocast_keeps_no_casts_of_the_weights_before_a_step(base: Any) -> None:
    model, x = nn.Linear(4, 4), torch.ones(2, 4)
    optimizer = SAM(model.parameters(), base, schedule=NEVER, lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.first_step()
        model(x).sum().backward()
        optimizer.second_step(zero_grad=True)
        inside = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), inside)


# ---- The counter -----------------------------------------------------------------------------------------------------


def steps(optimizer: SAM, params: list[nn.Parameter], number: int) -> list[bool]:
    """Which of the next steps perturb."""
    found = []
    for n in range(number):
        for p in params:
            p.grad = torch.full_like(p, float(n + 1))
        optimizer.first_step()
        found.append(optimizer.perturbed)
        optimizer.second_step()
    return found


@pytest.mark.guarantee(id="schedule-resume")
@pytest.mark.parametrize("kind", ["schedule", "rounding"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_has_the_counter(kind: str, flat: bool, tmp_path: Path) -> None:
    """It loads only what the new optimizer's own state dict has."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    made: dict[str, Any] = {"schedule": Schedule(every=3)} if kind == "schedule" else {"stochastic_rounding": True}

    def make() -> tuple[nn.Module, SAM]:
        model = nn.Linear(3, 3, dtype=torch.bfloat16)
        return model, SAM(model.parameters(), lr=0.1, momentum=0.9, **made)

    model, optimizer = make()
    steps(optimizer, list(model.parameters()), 4)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    checkpoint.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    other, resumed = make()
    state = {"optimizer": get_optimizer_state_dict(other, resumed, options=options)}
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, resumed, state["optimizer"], options=options)
    assert resumed.param_groups[0][STEP] == 4


def test_the_counter_survives_groups_that_come_and_go() -> None:
    params = make_params([3, 4])
    optimizer = SAM(params[:1], schedule=Schedule(every=3), lr=0.1)
    assert steps(optimizer, params[:1], 4) == [True, False, False, True]
    optimizer.add_param_group({"params": params[1:]})
    del optimizer.param_groups[0]
    assert steps(optimizer, params[1:], 3) == [False, False, True]


def test_the_counter_goes_on_where_a_run_is_resumed_without_a_schedule() -> None:
    params = make_params([3])
    with_schedule = SAM(params, schedule=Schedule(every=2), lr=0.1)
    steps(with_schedule, params, 3)
    without = SAM(params, lr=0.1)
    without.load_state_dict(with_schedule.state_dict())
    steps(without, params, 1)
    with_schedule.load_state_dict(without.state_dict())
    assert steps(with_schedule, params, 2) == [True, False]


def test_a_warning_that_is_an_error_comes_after_the_step_was_counted() -> None:
    params = make_params([3])
    optimizer = SAM(params, schedule=Schedule(start=50, total=2), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="none of its 2 steps"):
            steps(optimizer, params, 2)
    assert optimizer.param_groups[0][STEP] == 2


@pytest.mark.parametrize("schedule", [None, NEVER])
def test_what_is_refused_in_mid_step_does_not_depend_on_the_schedule(schedule: Schedule | None) -> None:
    params = make_params([3])
    optimizer = SAM(params, schedule=schedule, lr=0.1)
    optimizer.first_step()
    for call in (
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: optimizer.add_param_group({"params": make_params([2])}),
        lambda: copy.deepcopy(optimizer),
        lambda: optimizer.first_pass(nn.ParameterList(params)).__enter__(),
    ):
        with pytest.raises(RuntimeError, match=r"is refused between first_step\(\) and second_step\(\)"):
            call()
    optimizer.restore()
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_step_that_raises_is_not_counted() -> None:
    params = make_params([3])
    optimizer = SAM(params, torch.optim.RMSprop, schedule=NEVER, lr=0.1)
    before = values(params)
    optimizer.first_step()
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.second_step()
    assert optimizer.param_groups[0][STEP] == 0
    assert same_bits(params, before)


def test_training_goes_on_after_a_checkpoint_without_a_counter() -> None:
    """Such a checkpoint was saved without a schedule: its steps are not known, and the counter can be set."""
    model = network()
    optimizer = SAM(model.parameters(), schedule=Schedule(start=10, total=12), lr=0.1)
    optimizer.load_state_dict(SAM(network().parameters(), lr=0.1).state_dict())
    assert not optimizer.will_perturb
    for group in optimizer.param_groups:
        group[STEP] = 10
    assert optimizer.will_perturb
    guarded(model, optimizer, *batches(1)[0])
    assert optimizer.param_groups[0][STEP] == 11


# ---- Warnings --------------------------------------------------------------------------------------------------------


def run(schedule: Schedule, steps: int, counter: int = 0) -> list[str]:
    """The warnings of a few steps, and of the optimizer's end."""
    p = nn.Parameter(torch.ones(3))
    gc.collect()  # other tests' optimizers may warn as they go
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = SAM([p], schedule=schedule, lr=0.0)
        optimizer.param_groups[0][STEP] = counter
        for _ in range(steps):
            p.grad = torch.ones(3)
            optimizer.first_step()
            optimizer.second_step()
        del optimizer
        gc.collect()
    return [str(w.message) for w in caught]


def test_a_schedule_that_never_perturbs_is_one_warning() -> None:
    assert len(run(Schedule(start=500, total=20), 125)) == 1  # and none at its end
    (text,) = run(Schedule(start=0.9, total=1000), 101)
    assert "101" in text
    assert run(Schedule(start=0.9, total=1000), 100) == []
    assert run(Schedule(every=7), 120) == []
    assert run(Schedule(stop=10), 110, counter=20) == []  # resumed: the run before has perturbed


def test_grad_norm_waits_for_a_step_that_perturbs_and_says_so() -> None:
    params = make_params([3])
    optimizer = SAM(params, lr=0.1, schedule=Schedule(start=1))
    for n in range(2):
        with pytest.raises(RuntimeError, match=r"the first first_step\(\) that perturbs"):
            _ = optimizer.grad_norm
        give(params, n)
        optimizer.first_step()
        optimizer.second_step()
    assert float(optimizer.grad_norm) > 0.0


def test_checkpoints_may_hold_a_schedule() -> None:
    """As those of Lightning do after ``save_hyperparameters()``: torch.load refuses classes that it does not know."""
    schedule, file = Schedule(start=np.float64(0.5), total=8), io.BytesIO()
    torch.save({"hyper_parameters": {"schedule": schedule}}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["hyper_parameters"]["schedule"]
    assert (loaded, hash(loaded)) == (schedule, hash(schedule))
    assert loaded.perturbs(4)
