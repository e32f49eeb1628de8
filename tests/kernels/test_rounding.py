"""Stochastic rounding: exact on average, always one of the two neighbours, and the same bits on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import EMULATED, INTERPRETED, make_params, normal, same_bits, values
from conftest import rule_named
from torch import Tensor

from sam_fast.backends.bucket import CHUNK
from sam_fast.rounding import PERTURB, ROUNDED, UPDATE, round_stochastically, rounding_key

SIZES = [0, 1, 7, 8, 9, 31, 33, 1009, 4099, CHUNK + 5]
KEY = rounding_key(3, PERTURB)
dtypes = pytest.mark.parametrize("dtype", ROUNDED, ids=lambda d: str(d).removeprefix("torch."))

AWKWARD = [
    1.0,
    1.0 + 2.0**-12,
    -0.02,
    3.14159,
    1e-3,
    -(2.0**-14),
    2.0**-14 * 1.3,
    2.0**-15 * 1.7,
    3e-6,
    -2e-7,
    6e-8,
    2.0**-25,
    2.0**-31,
    65000.0,
    -65503.9,
]
"""Numbers that both formats have to round: normal, subnormal in float16, near its largest."""


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest number of ``dtype`` that is at most ``x``, and the smallest that is at least ``x``."""
    nearest = torch.tensor(x, dtype=torch.float64).to(dtype)

    def beside(direction: float) -> float:
        if dtype == torch.float16:
            return float(np.nextafter(np.float16(float(nearest)), np.float16(direction)))
        return float(torch.nextafter(nearest, torch.tensor(direction, dtype=dtype)))

    value = float(nearest)
    if value == x:
        return x, x
    return (value, beside(math.inf)) if value < x else (beside(-math.inf), value)


@dtypes
@pytest.mark.parametrize("x", AWKWARD)
def test_unbiased_and_always_a_neighbour(x, dtype):
    x = float(torch.tensor(x))
    rolls = 40_000
    index = torch.arange(rolls, dtype=torch.int32)
    got = round_stochastically(torch.full((rolls,), x), dtype, index, KEY).double()
    low, high = neighbours(x, dtype)
    assert bool(((got == low) | (got == high)).all())
    p = 0.0 if low == high else (x - low) / (high - low)
    # Five standard deviations of the mean, and the resolution of the random numbers: 2^-13 and 2^-16 of a unit where so
    # few bits go.
    bound = (5 * math.sqrt(p * (1 - p) / rolls) + 2.0**-13) * (high - low)
    assert abs(float(got.mean()) - x) <= bound
    keys = [
        round_stochastically(torch.tensor([x]), dtype, index[:1], rounding_key(step, UPDATE)).double()
        for step in range(500)
    ]
    assert abs(float(torch.cat(keys).mean()) - x) <= (5 * math.sqrt(p * (1 - p) / 500) + 2.0**-13) * (high - low)


@dtypes
def test_numbers_that_the_format_has_stay_and_so_do_the_special_ones(dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    got = round_stochastically(finite.float(), dtype, torch.arange(len(finite), dtype=torch.int32), KEY)
    assert same_bits([got], [finite])
    special = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 0.0, 65519.0, 65520.0, 1e6])
    got = round_stochastically(special, dtype, torch.arange(8, dtype=torch.int32), KEY)
    assert torch.equal(got.isnan(), special.isnan())
    assert got[:2].tolist() == [math.inf, -math.inf]
    assert bool(torch.signbit(got[3]))
    if dtype == torch.float16:
        assert got[5:].tolist() == [65504.0, math.inf, math.inf]


def test_keys_differ():
    keys = {rounding_key(step, operation) for step in range(1000) for operation in (PERTURB, UPDATE)}
    assert len(keys) == 2000


def test_neighbouring_elements_and_steps_are_not_correlated():
    n = 1 << 16
    index = torch.arange(n, dtype=torch.int32)
    half = torch.full((n,), 1.0 + 2.0**-8)  # halfway: up or down like a coin

    def coins(step: int, elements: Tensor = index) -> Tensor:
        return (
            round_stochastically(half, torch.bfloat16, elements, rounding_key(step, PERTURB)).double() > 1.0
        ).double() * 2 - 1

    bound = 5 / math.sqrt(n)
    first = coins(1)
    assert abs(float(first.mean())) < bound
    for other in (coins(2), coins(1, index + 1), coins(1, index + 32), coins(1, index + 16384)):
        assert abs(float((first * other).mean())) < bound


# ---- The kernels -----------------------------------------------------------------------------------------------------


def moved_to(make_step, dtype: torch.dtype, adaptive: bool, key: int | None) -> list[Tensor]:
    """The weights after perturb, with a norm that does not depend on it."""
    params = make_params(SIZES, dtype)
    s = make_step(params, options=[{"adaptive": adaptive, "eta": 0.01}])
    s.options.rounding_key = key
    assert s.bucket.collect(s.options)
    s.partials.zero_()
    s.partials[0] = 0.25
    s.perturb()
    moved = values(params)
    s.restore()
    assert same_bits(values(params), values(make_params(SIZES, dtype)))
    return moved


@dtypes
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_perturb_has_the_bits_of_the_formula(step, dtype, adaptive):
    moved = moved_to(step, dtype, adaptive, KEY)
    slot = 0
    for p, got in zip(make_params(SIZES, dtype), moved, strict=True):
        w, g = p.detach().float(), p.grad.float()
        scale = torch.tensor(0.05 / (0.5 + 1e-12), dtype=torch.float32)
        t = w.abs() + torch.tensor(0.01, dtype=torch.float32)
        exact = w + ((t * g) * scale) * t if adaptive else w + g * scale
        index = torch.arange(slot, slot + p.numel(), dtype=torch.int32)
        assert same_bits([got], [round_stochastically(exact, dtype, index, KEY)])
        slot += -(-p.numel() // 32) * 32  # slots start on 64-byte lines


@dtypes
def test_without_a_key_perturb_rounds_to_nearest(step, dtype):
    moved = moved_to(step, dtype, False, None)
    for p, got in zip(make_params(SIZES, dtype), moved, strict=True):
        assert same_bits([got], [(p.detach().float() + p.grad.float() * torch.tensor(0.05 / (0.5 + 1e-12))).to(dtype)])


@dtypes
def test_wider_formats_ignore_the_key(step, dtype):
    wide = torch.float32 if dtype == torch.bfloat16 else torch.float64
    assert same_bits(moved_to(step, wide, False, KEY), moved_to(step, wide, False, None))


UPDATES = {
    "sgd": (0.1, 0.9, 0.0, 0.01, 1.0, 0.0),
    "adam": (0.1, 0.9, 0.99, 1e-8, 0.01, 1.0, 0.0, 0.0),
}


def updated(step, operation: str, dtype: torch.dtype, key: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """The new weights; and what they would be with float32 weights, gradients and state of the same values."""

    def run(dtype_of_run: torch.dtype) -> list[Tensor]:
        params = make_params(SIZES, dtype)
        for i, p in enumerate(params):
            p.data = p.data.to(dtype_of_run)
            p.grad = make_params([p.numel()], dtype, seed=50 + i)[0].grad.to(dtype_of_run)
        s = step(params)
        s.first_step()
        state = {
            name: [torch.full_like(p, 0.0625) for p in params] for name in ("momentum_buffer", "exp_avg", "exp_avg_sq")
        }
        if operation == "sgd":
            tensors = {"momentum_buffer": state["momentum_buffer"]}
        else:
            counters = [torch.tensor(5.0, device="cpu") for _ in params]
            tensors = {
                "step": counters,
                "exp_avg": state["exp_avg"],
                "exp_avg_sq": state["exp_avg_sq"],
                "max_exp_avg_sq": [None] * len(params),
            }
        s.take(rule_named(operation), [UPDATES[operation]], tensors, rounding_key=key)
        return values(params)

    return run(dtype), run(torch.float32)


@pytest.mark.parametrize("operation", UPDATES)
@dtypes
def test_the_update_has_the_bits_of_the_formula(step, kernels, operation, dtype):
    if operation not in kernels.bucket.steps:
        pytest.skip("no fused second step")
    key = rounding_key(4, UPDATE)
    got, exact = updated(step, operation, dtype, key)
    slot = 0
    for new, x in zip(got, exact, strict=True):
        index = torch.arange(slot, slot + x.numel(), dtype=torch.int32)
        assert same_bits([new], [round_stochastically(x, dtype, index, key)])
        slot += -(-x.numel() // 32) * 32


@pytest.mark.guarantee(id="stochastic-rounding")
@pytest.mark.skipif(INTERPRETED or EMULATED, reason="too large to be interpreted or emulated")
def test_most_of_e_survives(step):
    """11 million weights of sd 0.02, rho 0.05.

    A normal distribution's weights have units of 2^-17 to 2^-12; e's elements are about 1.5e-5.
    """
    n, rho = 11_000_000, 0.05
    generator = torch.Generator().manual_seed(0)
    w = (normal(n, generator) * 0.02).bfloat16()
    g = (normal(n, generator) * 0.001).bfloat16()
    direction = g.double() / g.double().norm()
    component, noise = {}, {}
    for key in (None, KEY):
        p = torch.nn.Parameter(w.clone())
        p.grad = g.clone()
        s = step([p])
        s.options.rounding_key = key
        s.first_step()
        e = p.detach().double() - w.double()
        component[key] = float(e @ direction)
        noise[key] = float((e - rho * direction).norm())
        s.restore()
        assert torch.equal(p.detach(), w)
    assert abs(component[KEY] - rho) < 0.01 * rho
    # docs/mixed_precision.md has these figures, and those of the noise.
    assert component[None] == pytest.approx(0.021, abs=5e-4)
    assert (noise[None], noise[KEY]) == pytest.approx((0.042, 0.098), abs=5e-4)
    # What it costs: each element has a variance of p (1 - p) units^2, where p is how far w + e is on the way between
    # its neighbours.
    exact = w.double() + rho * direction
    unit = torch.nextafter(w.abs(), torch.tensor(math.inf, dtype=torch.bfloat16)).double() - w.abs().double()
    way = ((exact - w.double()) / unit).abs().clamp(max=1.0)
    predicted = float((way * (1 - way) * unit.square()).sum().sqrt())
    assert noise[KEY] == pytest.approx(predicted, rel=0.05)
