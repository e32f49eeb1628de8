"""Schedules: which steps perturb, the counter in checkpoints, and every loop around them against plain PyTorch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import buckets_of
from plain_sam import PlainSAM, furthest
from torch import nn
from torch.nn.functional import cross_entropy

from sam_fast import SAM, Schedule, TrainStep, disable_running_stats, enable_running_stats, norm_layers_only
from sam_fast.schedule import STEP

SCHEDULES = [
    Schedule(),
    Schedule(every=3),
    Schedule(start=0.5, total=30),
    Schedule(every=3, start=4, stop=20),
    Schedule(stop=0.25, total=30),
]
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-4}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-4}),
}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).to(dtype)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(12, 5, generator=generator, device="cpu").to(dtype),
            torch.randint(0, 3, (12,), generator=generator, device="cpu"),
        )
        for _ in range(steps)
    ]


def plain(
    model: nn.Module,
    schedule: Schedule | None,
    base: str,
    adaptive: bool = False,
    rows: int = 1,
    norms: bool = False,
) -> None:
    """30 steps of what a schedule means, with nothing of sam_fast."""
    cls, options = BASES[base]
    optimizer = PlainSAM(model.parameters(), cls, rho=0.1, adaptive=adaptive, **options)
    device = next(model.parameters()).device
    for step, (x, y) in enumerate(batches(30)):
        x, y = x.to(device), y.to(device)
        perturbs = schedule is None or (
            step >= _steps(schedule.start, schedule)
            and (step - _steps(schedule.start, schedule)) % schedule.every == 0
            and (schedule.stop is None or step < _steps(schedule.stop, schedule))
        )
        if perturbs:
            cross_entropy(model(x[::rows]), y[::rows]).backward()
            for name, p in model.named_parameters():
                if norms and not name.startswith("1."):  # the place of the only one
                    p.grad = None
            optimizer.first_step()
        kept = [b.clone() for b in model.buffers()]
        cross_entropy(model(x), y).backward()
        if perturbs:
            for buffer, value in zip(model.buffers(), kept, strict=True):
                buffer.copy_(value)
        optimizer.second_step()
        optimizer.old = []


def _steps(bound: float, schedule: Schedule) -> int:
    return round(bound * schedule.total) if isinstance(bound, float) and schedule.total else int(bound)


def guarded(model: nn.Module, optimizer: SAM, x: torch.Tensor, y: torch.Tensor) -> None:
    if optimizer.needs_first_pass:
        with optimizer.first_pass(model):
            cross_entropy(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    with optimizer.second_pass(model):
        cross_entropy(model(x), y).backward()
    optimizer.second_step(zero_grad=True)


def guarded_reference_style(model: nn.Module, optimizer: SAM, x: torch.Tensor, y: torch.Tensor) -> None:
    if optimizer.needs_first_pass:
        cross_entropy(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    disable_running_stats(model)
    cross_entropy(model(x), y).backward()
    optimizer.second_step(zero_grad=True)
    enable_running_stats(model)


def no_first_step(model: nn.Module, optimizer: SAM, x: torch.Tensor, y: torch.Tensor) -> None:
    if optimizer.will_perturb:
        cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
    with optimizer.second_pass(model):
        cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def todays(model: nn.Module, optimizer: SAM, x: torch.Tensor, y: torch.Tensor) -> None:
    cross_entropy(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    with optimizer.second_pass(model):
        cross_entropy(model(x), y).backward()
    optimizer.second_step(zero_grad=True)


def closure(model: nn.Module, optimizer: SAM, x: torch.Tensor, y: torch.Tensor) -> None:
    def compute() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(compute)
    optimizer.zero_grad()


def train_step(model: nn.Module, optimizer: SAM, x: torch.Tensor, y: torch.Tensor) -> None:
    TrainStep(model, optimizer, lambda m, x, y: cross_entropy(m(x), y))(x, y)


LOOPS = [guarded, guarded_reference_style, no_first_step, todays, closure, train_step]


# ---- Schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [*SCHEDULES, Schedule(start=0.0, stop=1.0, total=30)], ids=repr)
def test_perturbs_as_the_formula_says(schedule: Schedule) -> None:
    first, stop = _steps(schedule.start, schedule), schedule.stop
    end = 10**9 if stop is None else _steps(stop, schedule)
    want = [step in range(first, end, schedule.every) for step in range(40)]
    assert [schedule.perturbs(step) for step in range(40)] == want
    assert any(want)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"every": 0}, ValueError, "every"),
        ({"every": 2.0}, TypeError, "every"),
        ({"every": True}, TypeError, "every"),
        ({"total": 0}, ValueError, "total"),
        ({"start": -1}, ValueError, "start"),
        ({"start": 0.5}, ValueError, "total="),
        ({"start": 1.5, "total": 10}, ValueError, "start"),
        ({"stop": "3"}, TypeError, "stop"),
        ({"start": 5, "stop": 5}, ValueError, "no step"),
    ],
)
def test_bad_schedules_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Schedule(**options)


def test_sam_refuses_what_is_no_schedule_and_other_directions() -> None:
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(TypeError, match="schedule"):
        SAM(params, schedule=4)
    with pytest.raises(ValueError, match="along"):
        SAM(params, along="momentum")


# ---- Against plain PyTorch -------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="schedule")
@pytest.mark.not_interpreted
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_thirty_steps_equal_plain_pytorch(backend: str, flatten: bool, schedule: Schedule, base: str) -> None:
    cls, options = BASES[base]
    model, expected = network(), network()
    optimizer = SAM(model.parameters(), cls, rho=0.1, backend=backend, flatten=flatten, schedule=schedule, **options)
    for x, y in batches(30):
        guarded(model, optimizer, x.to(next(model.parameters()).device), y.to(next(model.parameters()).device))
    plain(expected, schedule, base)
    # Chaotic in AdamW's and RMSprop's divisions: 1e-16 grows, but stays far from a mistake's 1e-3.
    assert furthest(model.parameters(), expected.parameters()) < 1e-8
    assert furthest(model.buffers(), expected.buffers()) < 1e-8
    assert optimizer.param_groups[0][STEP] == 30


@pytest.mark.guarantee(id="one-pass-counts")
@pytest.mark.parametrize("schedule", [Schedule(every=3), Schedule(start=0.5, total=30)], ids=repr)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
def test_every_loop_counts_statistics_once(loop: Any, schedule: Schedule, flatten: bool) -> None:
    model, expected = network(), network()
    optimizer = SAM(model.parameters(), rho=0.1, flatten=flatten, schedule=schedule, lr=0.1, momentum=0.9)
    for x, y in batches(30):
        loop(model, optimizer, x, y)
    plain(expected, schedule, "SGD")
    assert furthest(model.parameters(), expected.parameters()) < 1e-10
    assert furthest(model.buffers(), expected.buffers()) < 1e-10
    assert not optimizer.perturbed


LONG = pytest.mark.not_interpreted


@pytest.mark.parametrize(
    ("adaptive", "rows", "schedule", "norms"),
    [
        pytest.param(True, 1, Schedule(every=2), False, marks=LONG),
        pytest.param(False, 4, None, False, marks=LONG),
        (False, 4, Schedule(start=0.5, total=30), False),
        (True, 4, Schedule(every=2), False),
        pytest.param(False, 1, None, True, marks=LONG),
        (False, 4, Schedule(every=3), True),
    ],
)
@pytest.mark.guarantee(id="schedule")
def test_thirty_train_steps_equal_plain_pytorch(
    backend: str, adaptive: bool, rows: int, schedule: Schedule | None, norms: bool
) -> None:
    """ASAM, a quarter of the batch, normalization layers alone, and schedules of them."""
    model, expected = network(), network()
    groups = norm_layers_only(model) if norms else model.parameters()
    optimizer = SAM(groups, rho=0.1, adaptive=adaptive, backend=backend, schedule=schedule, lr=0.1, momentum=0.9)
    step = TrainStep(model, optimizer, lambda m, x, y: cross_entropy(m(x), y), ascent=1 / rows)
    device = next(model.parameters()).device
    for x, y in batches(30):
        step(x.to(device), y.to(device))
    plain(expected, schedule, "SGD", adaptive, rows, norms)
    assert furthest(model.parameters(), expected.parameters()) < 1e-10
    assert furthest(model.buffers(), expected.buffers()) < 1e-10


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_perturbing_always_has_the_bits_of_no_schedule(base: str) -> None:
    cls, options = BASES[base]
    models = [network(torch.float32) for _ in range(2)]
    for model, schedule in zip(models, (None, Schedule()), strict=True):
        optimizer = SAM(model.parameters(), cls, schedule=schedule, **options)
        for x, y in batches(10, torch.float32):
            guarded(model, optimizer, x, y)
        assert (STEP in optimizer.param_groups[0]) == (schedule is not None)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.guarantee(id="schedule")
def test_a_step_that_does_not_perturb_is_fused_and_moves_nothing_before() -> None:
    model = network()
    optimizer = SAM(model.parameters(), schedule=Schedule(start=2), lr=0.1)
    (x, y), *_ = batches(1)
    before = [p.detach().clone() for p in model.parameters()]
    assert not optimizer.will_perturb
    assert not optimizer.needs_first_pass
    optimizer.first_step()
    assert not optimizer.perturbed
    with pytest.raises(RuntimeError, match="twice"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"between first_step"), optimizer.first_pass(model):
        raise AssertionError("not reached")
    assert furthest(model.parameters(), before) == 0.0
    cross_entropy(model(x), y).backward()
    optimizer.second_step()
    assert optimizer.second_step_path == "fused"
    assert all(bucket.saved() == [] for bucket in buckets_of(optimizer))


def test_a_perturbing_step_needs_its_first_step() -> None:
    optimizer = SAM(network().parameters(), schedule=Schedule(every=2), lr=0.1)
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.step()


def test_the_closure_is_called_once_where_no_first_pass_is_needed() -> None:
    model = network()
    optimizer = SAM(model.parameters(), schedule=Schedule(every=3), lr=0.1)
    calls = []
    for step, (x, y) in enumerate(batches(6)):

        def compute(step: int = step, x: Any = x, y: Any = y) -> torch.Tensor:
            calls.append(step)
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        assert optimizer.step(compute) is not None
        optimizer.zero_grad()
    assert calls == [0, 0, 1, 2, 3, 3, 4, 5]


# ---- Faults, scaler, checkpoints -------------------------------------------------------------------------------------


def test_a_step_that_was_given_up_is_not_counted() -> None:
    model = network()
    optimizer = SAM(model.parameters(), schedule=Schedule(every=2), lr=0.1)
    (x, y), *_ = batches(1)
    for _ in range(2):
        guarded(model, optimizer, x, y)
    before = [p.detach().clone() for p in model.parameters()]
    cross_entropy(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(ZeroDivisionError), optimizer.second_pass(model):
        raise ZeroDivisionError
    assert furthest(model.parameters(), before) == 0.0
    assert optimizer.param_groups[0][STEP] == 2
    guarded(model, optimizer, x, y)
    optimizer.first_step()  # step 3 does not perturb
    optimizer.restore()
    assert optimizer.param_groups[0][STEP] == 3
    guarded(model, optimizer, x, y)
    assert optimizer.param_groups[0][STEP] == 4


@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaler_steps_what_does_not_perturb(backend: str, overflow: bool) -> None:
    models = [network(torch.float32) for _ in range(2)]
    (x, y), *_ = batches(1, torch.float32)
    device = next(models[0].parameters()).device
    x, y = x.to(device), y.to(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    optimizer = SAM(models[0].parameters(), schedule=Schedule(start=5), backend=backend, lr=0.1)
    optimizer.first_step()
    scaler.scale(cross_entropy(models[0](x), y)).backward()
    if overflow:
        models[0][0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    sgd = torch.optim.SGD(models[1].parameters(), lr=0.1)
    if not overflow:
        cross_entropy(models[1](x), y).backward()
        sgd.step()
    # Scaling by a power of two and back is exact but for the subnormal.
    assert furthest(models[0].parameters(), models[1].parameters()) < 1e-7
    assert scaler.get_scale() == (2.0**9 if overflow else 2.0**10)
    assert optimizer.param_groups[0][STEP] == 1


@pytest.mark.guarantee(id="schedule-resume")
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_resuming_anywhere_goes_on_with_the_same_bits(base: str, flatten: bool) -> None:
    cls, options = BASES[base]
    schedule = Schedule(every=3, start=2, stop=9)

    def make() -> tuple[nn.Module, SAM]:
        model = network(torch.float32)
        return model, SAM(model.parameters(), cls, rho=0.1, flatten=flatten, schedule=schedule, **options)

    data = batches(12, torch.float32)
    model, optimizer = make()
    states = []
    for x, y in data:
        states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        guarded(model, optimizer, x, y)
    for at, (weights, state) in enumerate(states):
        resumed, its = make()
        resumed.load_state_dict(weights)
        its.load_state_dict(state)
        for x, y in data[at:]:
            guarded(resumed, its, x, y)
        for a, b in zip(resumed.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b), at


def test_a_plain_checkpoint_starts_the_counter() -> None:
    model = network()
    plain_sgd = torch.optim.SGD(network().parameters(), lr=0.1)
    optimizer = SAM(model.parameters(), schedule=Schedule(every=2), lr=0.1)
    for x, y in batches(3):
        guarded(model, optimizer, x, y)
    optimizer.load_state_dict(plain_sgd.state_dict())
    assert optimizer.will_perturb
    guarded(model, optimizer, *batches(1)[0])
    assert optimizer.param_groups[0][STEP] == 1


def test_copies_keep_the_schedule() -> None:
    optimizer = SAM(network().parameters(), schedule=Schedule(every=2, start=1), lr=0.1)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), copy.copy(optimizer)):
        assert not twin.will_perturb
        assert twin._schedule == Schedule(every=2, start=1)
