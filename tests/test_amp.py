"""Mixed precision: GradScaler's contract, overflows in either pass, autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import make_params, same_bits, values
from scaled_runs import BASES, INF, NAN, SGD, Run, batch_of, scaler_with
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sam_fast import SAM, amp, base_step, sam
from sam_fast.backends import tensor_lists


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> dict[str, Any]:
    return BASES[request.param]


Make = Callable[..., "Run"]


@pytest.fixture
def make(backend: str, flatten: bool) -> Make:
    return lambda base, *args, **options: Run({"backend": backend, "flatten": flatten, **base}, *args, **options)


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for mine, other in zip(a.values(), b.values(), strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert same_bits([value], [other[name]]) if isinstance(value, Tensor) else value == other[name], name


# ---- Without an overflow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
def test_a_power_of_two_changes_no_bit(make: Make, base: dict[str, Any], clip: bool) -> None:
    """Including those by which a scaler grows."""
    plain, scaled = make(base, clip=clip), make(base, scaler_with(growth_interval=2), clip=clip)
    for batch in range(5):
        assert plain.step(batch) == scaled.step(batch)
    assert scaled.scaler.get_scale() == 2.0**14
    assert same_bits(plain.weights, scaled.weights)
    assert_same_state(plain.state(), scaled.state())


def test_any_other_scale_is_a_matter_of_rounding(make: Make, base: dict[str, Any]) -> None:
    """5 steps of 0.01; where a gradient is about 0, Adam's direction may be anything, so the bound is on the whole."""
    plain, scaled = make(base), make(base, scaler_with(1000.0))
    start = torch.cat([w.flatten() for w in plain.weights])
    for batch in range(5):
        plain.step(batch)
        scaled.step(batch)
    a, b = (torch.cat([w.flatten() for w in run.weights]) for run in (plain, scaled))
    assert float((a - b).norm()) < 1e-5 * float((a - start).norm())
    assert not torch.equal(a, start)


def test_unscale_is_gradscalers_own_to_the_bit(make: Make) -> None:
    """A base optimizer that is not fused sees the gradients as ``unscale_`` leaves them, at any scale."""
    runs = [make(BASES["sgd"], scaler_with(1000.0)) for _ in range(2)]
    for run in runs:
        run.backward(*batch_of(0), None)
        run.optimizer.first_step(zero_grad=True)
        run.backward(*batch_of(0), None)
    runs[1].scaler.unscale_(runs[1].optimizer)
    for run in runs:
        run.scaler.step(run.optimizer)
    assert same_bits(runs[0].weights, runs[1].weights)


def test_several_dtypes_are_unscaled(backend: str) -> None:
    params = [
        *make_params([5], grads=False),
        *make_params([7], torch.float64, grads=False),
        *make_params([3], torch.bfloat16, grads=False),
    ]
    optimizer, scaler = SAM(params, lr=1.0, rho=0.0, backend=backend), scaler_with(1024.0)
    before = values(params)
    for call in (optimizer.first_step, lambda: scaler.step(optimizer)):
        optimizer.zero_grad()
        scaler.scale(sum((p.float() * 0.5).sum() for p in params)).backward()
        call()
    assert same_bits(values(params), [w - 0.5 for w in before])


# ---- Overflows -------------------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="grad-scaler")
@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(INF, None), (NAN, None), (None, INF), (INF, NAN)],
    ids=["first", "first-nan", "second", "both"],
)
@pytest.mark.parametrize("steps", [0, 3], ids=["at-once", "later"])
def test_after_an_overflow_everything_is_as_it_was_but_the_scale(
    make: Make, base: dict[str, Any], first: float | None, second: float | None, clip: bool, steps: int
) -> None:
    plain, scaled = make(base, clip=clip), make(base, scaler_with(2.0**12), clip=clip)
    for batch in range(steps):
        plain.step(batch)
        scaled.step(batch)
    assert scaled.scaler._get_growth_tracker() == steps
    before, state = scaled.weights, scaled.state()
    scaled.step(9, first, second)
    assert not scaled.optimizer.perturbed
    assert same_bits(scaled.weights, before)
    assert_same_state(scaled.state(), state)
    assert scaled.scaler.get_scale() == 2.0**11
    assert scaled.scaler._get_growth_tracker() == 0
    for batch in range(steps, steps + 2):  # and what follows is as if nothing had been
        plain.step(batch)
        scaled.step(batch)
    assert same_bits(scaled.weights, plain.weights)
    assert_same_state(scaled.state(), plain.state())
    assert scaled.scaler.get_scale() == 2.0**11
    assert scaled.scaler._get_growth_tracker() == 2


def test_a_scale_that_is_too_large_comes_down_by_itself(make: Make, base: dict[str, Any]) -> None:
    """2^140 is more than float32 holds, so the loss itself is infinite for a while."""
    run = make(base, scaler_with(2.0**127, backoff_factor=2.0**-8))
    before = run.weights
    steps = 0
    while same_bits(run.weights, before):
        run.step(0)
        steps += 1
        assert steps < 8
    assert all(bool(w.isfinite().all()) for w in run.weights)


def test_no_overflow_counts_where_the_gradient_is_not_used(backend: str) -> None:
    """Groups that are not perturbed throw their first gradient away."""
    params = make_params([3, 4], grads=False)
    optimizer = SAM([{"params": params[:1]}, {"params": params[1:], "perturb": False}], lr=0.1, backend=backend)
    scaler = scaler_with()
    before = values(params)
    for call in (optimizer.first_step, lambda: scaler.step(optimizer)):
        optimizer.zero_grad()
        scaler.scale(sum(p.sum() for p in params)).backward()
        if not optimizer.perturbed:
            params[1].grad[0] = INF  # type: ignore[index]
        call()
    scaler.update()
    assert scaler.get_scale() == 2.0**12
    assert not any(torch.equal(a, b) for a, b in zip(values(params), before, strict=True))


@pytest.mark.parametrize("name", ["sgd-fused", "adamw"])
def test_without_gradient_synchronisation_only_the_second_pass_decides(make: Make, name: str) -> None:
    """Another rank has not seen this one's overflow and makes its update; so must this one, once, and at the same
    scale.
    """
    runs = [make(BASES[name], scaler_with()) for _ in range(2)]
    for run, plant in zip(runs, (INF, None), strict=True):
        run.step(0)
        with run.optimizer.first_pass(run.model, sync=False):
            run.backward(*batch_of(1), plant)
        run.optimizer.first_step(zero_grad=True)
        run.model.zero_grad()
        for p in run.model.parameters():
            p.grad = torch.ones_like(p)  # what the ranks share
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
    assert same_bits(runs[0].weights, runs[1].weights)
    assert runs[0].scaler.get_scale() == 2.0**12
    before = runs[0].weights
    runs[0].step(2, first=INF)
    assert same_bits(runs[0].weights, before)
    assert runs[0].scaler.get_scale() == 2.0**11


def test_a_first_pass_without_synchronisation_that_raised_is_forgotten(make: Make) -> None:
    run = make(BASES["sgd"], scaler_with())
    with contextlib.suppress(ZeroDivisionError), run.optimizer.first_pass(run.model, sync=False):
        raise ZeroDivisionError
    run.step(0, first=INF)
    assert run.scaler.get_scale() == 2.0**11


# ---- No waiting for the device ---------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads out of tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd-plain", [0, 0, 0]),
        ("sgd-fused", [1, 0, 0]),
        ("adamw-fused", [1, 0, 0]),
        ("sgd", [1, 1, 1]),
        ("sgd-foreach", [1, 1, 1]),
    ],
)
def test_a_fused_base_optimizer_decides_on_the_device_once_it_has_its_state(
    make: Make, name: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a device whose backend has no fused second step; on the CPU that one reads what waits for nothing.
    monkeypatch.setattr(sam, "fused_step", lambda *_: "not here")
    monkeypatch.setattr(amp, "_is_on_host", lambda _: False)
    monkeypatch.setattr(tensor_lists, "is_on_host", lambda _: False)
    monkeypatch.setattr(base_step, "FUSED_ON_CPU", ())
    run, reads = make(BASES[name], scaler_with()), []
    for plant in (None, None, INF):
        run.backward(*batch_of(0), plant)
        with Reads() as reading:
            run.optimizer.first_step(zero_grad=True)
        assert reading.count == 0
        run.backward(*batch_of(0), None)
        with Reads() as reading:
            run.scaler.step(run.optimizer)
            run.scaler.update()
        reads.append(reading.count)
        run.optimizer.zero_grad()
    assert reads == expected


# ---- Misuse and mishaps ----------------------------------------------------------------------------------------------


def test_a_disabled_scaler_is_no_scaler(make: Make, base: dict[str, Any]) -> None:
    run = make(base)
    run.step(0)
    assert not run.scaler.is_enabled()
    run.scaler.step(run.optimizer, lambda: run.backward(*batch_of(1), None))
    assert not run.optimizer.perturbed


def test_a_closure_is_refused_and_nothing_is_left_behind() -> None:
    plain, run = Run(BASES["sgd"]), Run(BASES["sgd"], scaler_with())
    before = run.weights
    run.backward(*batch_of(0), None)
    with pytest.raises(RuntimeError, match=r"first_step\(\) and scaler\.step"):
        run.scaler.step(run.optimizer, lambda: None)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        run.scaler.step(run.optimizer, closure=lambda: None)
    assert same_bits(run.weights, before)
    run.scaler.update()
    run.optimizer.zero_grad()
    plain.step(0)
    run.step(0)
    assert same_bits(run.weights, plain.weights)


def test_a_step_without_first_step_says_so_and_leaves_no_scale_behind(make: Make, base: dict[str, Any]) -> None:
    plain, run = make(base), make(base, scaler_with())
    run.backward(*batch_of(0), None)
    with pytest.raises(RuntimeError, match="first_step"):
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    plain.step(0)
    run.step(0)
    assert same_bits(run.weights, plain.weights)


@pytest.mark.parametrize("name", ["sgd", "adamw-fused"])
def test_a_base_optimizer_that_raises_keeps_no_scale(make: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(BASES[name], scaler_with())
    run.step(0)
    before, seen = run.weights, []

    def fail() -> None:
        seen.append(
            (hasattr(run.optimizer.base_optimizer, "grad_scale"), hasattr(run.optimizer.base_optimizer, "found_inf"))
        )
        raise RuntimeError("base failed")

    monkeypatch.setattr(amp, "_is_on_host", lambda _: False)  # as on a device: a fused step is told
    monkeypatch.setattr(run.optimizer.base_optimizer, "step", fail)
    with pytest.raises(RuntimeError, match="base failed"):
        run.step(1)
    assert seen == [("fused" in name,) * 2]
    for optimizer in (run.optimizer, run.optimizer.base_optimizer):
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    assert not run.optimizer.perturbed
    assert same_bits(run.weights, before)


def test_gradients_in_float16_are_refused_as_by_torch(backend: str) -> None:
    params = make_params([5], torch.float16)
    optimizer, scaler = SAM(params, lr=0.1, backend=backend), scaler_with()
    scaler.scale(torch.ones(()))
    before = values(params)
    optimizer.first_step()
    with pytest.raises(ValueError, match="float16"):
        scaler.step(optimizer)
    assert same_bits(values(params), before)
    assert not optimizer.perturbed


@pytest.mark.parametrize("first", [INF, None])
def test_no_gradient_in_the_second_pass(base: dict[str, Any], first: float | None) -> None:
    run = Run(base, scaler_with())
    before = run.weights
    run.backward(*batch_of(0), first)
    run.optimizer.first_step(zero_grad=True)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    assert same_bits(run.weights, before)
    assert run.scaler.get_scale() == (2.0**12 if first is None else 2.0**11)


# ---- Autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)], ids=["float16", "bfloat16"]
)
def test_autocast_follows_float32(make: Make, base: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """20 steps: the way that the weights have come differs from float32's by less than the tolerance, relative."""
    options = {**base, "lr": 0.1} if base["base_optimizer"] is SGD else base
    runs = [make(options), make(options, scaler_with(2.0**10))]
    device = torch.get_default_device().type
    runs[1].autocast = lambda: torch.autocast(device, dtype=dtype)
    start = torch.cat([w.flatten() for w in runs[0].weights])
    losses = [[run.step(batch) for batch in range(20)] for run in runs]
    a, b = (torch.cat([w.flatten() for w in run.weights]) for run in runs)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=tolerance)
    assert losses[0][0] != losses[1][0]
    assert float((a - b).norm()) < tolerance * float((a - start).norm())
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.mark.guarantee(id="stale-graph")
def test_both_passes_in_one_autocast_region_see_their_own_weights(make: Make) -> None:
    """Autocast keeps the casts of weights until its region ends: the second pass would be at w, and the step after it
    at w + e.
    """
    inner, outer = make(BASES["sgd"]), make(BASES["sgd"])
    device = torch.get_default_device().type
    inner.autocast = lambda: torch.autocast(device, dtype=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        losses = [outer.step(batch) for batch in range(3)]
    assert losses == [inner.step(batch) for batch in range(3)]
    assert same_bits(inner.weights, outer.weights)
