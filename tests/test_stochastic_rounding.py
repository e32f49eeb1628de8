"""SAM(stochastic_rounding=True): weights in 16-bit formats move as far as they should, and everything else holds as
before.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import make_params, same_bits, values
from torch import nn

from sam_fast import SAM
from sam_fast.rounding import ROUNDED

SIZES = [5, 0, 17, 4003]
dtypes = pytest.mark.parametrize("dtype", ROUNDED, ids=lambda d: str(d).removeprefix("torch."))


def stand_still(optimizer):
    """Its second steps only restore."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0


def make(dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[SAM, list[nn.Parameter]]:
    params = make_params(SIZES, dtype)
    settings: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "stochastic_rounding": True, **options}
    return SAM(params, torch.optim.SGD, **settings), params


def run(optimizer: SAM, params: list[nn.Parameter], steps: range) -> list[torch.Tensor]:
    """The perturbed weights of the last step; the weights end at its second step."""
    perturbed = values(params)
    for step in steps:
        for seed, advance in ((2 * step, optimizer.first_step), (2 * step + 1, optimizer.second_step)):
            for p, q in zip(params, make_params(SIZES, params[0].dtype, seed=seed), strict=True):
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad.copy_(q.grad)
            advance()
            if optimizer.perturbed:
                perturbed = values(params)
    return perturbed


@pytest.mark.guarantee(id="stochastic-rounding")
@dtypes
def test_e_is_unbiased_and_restore_is_exact(dtype):
    optimizer, params = make(dtype, rho=1e-3)
    stand_still(optimizer)
    start = values(params)
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    rounds = 400
    for _ in range(rounds):
        optimizer.first_step()
        for t, p, w in zip(total, params, start, strict=True):
            t += p.detach().double() - w.double()
        optimizer.second_step()
        assert same_bits(values(params), start)
    norm = float(optimizer.grad_norm)
    e = torch.cat([p.grad.double() * (1e-3 / norm) for p in params])
    mean = torch.cat(total) / rounds
    # An upper bound of the distance between neighbours, at most twice too large; and of the probability of the less
    # likely one.
    unit = torch.finfo(dtype).eps * (torch.cat(start).double().abs() + e.abs()).clamp(
        min=torch.finfo(dtype).smallest_normal
    )
    rare = (2 * e.abs() / unit).clamp(min=0.01, max=0.5)
    # Eight standard deviations (where few coins fall their number has a long tail), and 2^-12 units for the random
    # numbers' resolution.
    assert bool(((mean - e).abs() <= 8 * unit * (rare * (1 - rare) / rounds).sqrt() + unit * 2.0**-12).all())
    # Along e the noise averages out over the elements as well: its standard deviation is below 1 % here.
    assert float(mean @ e / (e @ e)) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_small_updates_are_not_lost(base):
    """Steps of 1e-4 from 1.0, where bfloat16's next number below is 2^-8 away: to nearest the weight never moves."""
    moved = {}
    for rounding in (False, True):
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = SAM([p], base, lr=1e-4, rho=0.0, weight_decay=0.0, stochastic_rounding=rounding)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.first_step()
            optimizer.second_step()
        moved[rounding] = 1.0 - float(p.detach().double().mean())
    assert moved[False] == 0.0
    # SGD makes all its steps in the kernel; AdamW's first is the base optimizer's own. Standard deviation of the mean:
    # under 1e-4.
    assert moved[True] == pytest.approx(0.01, abs=5e-4)


def test_the_same_bits_in_every_run_and_flattened():
    runs = []
    for options in ({}, {}, {"flatten": True}, {"backend": "torch"}):
        optimizer, params = make(**options)
        torch.manual_seed(len(runs))  # it has no part in it
        perturbed = run(optimizer, params, range(5))
        runs.append([*perturbed, *values(params)])
    assert all(same_bits(runs[0], other) for other in runs[1:])


def test_every_step_rounds_anew():
    optimizer, params = make(rho=1e-3)
    stand_still(optimizer)
    optimizer.first_step()
    first = values(params)
    optimizer.restore()
    optimizer.first_step()
    assert same_bits(values(params), first)  # a step that was given up is taken again
    optimizer.second_step()
    optimizer.first_step()
    assert not same_bits(values(params), first)


def test_a_resumed_run_goes_on_with_the_same_bits():
    optimizer, params = make()
    run(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, resumed_params = make()
    for p, q in zip(resumed_params, params, strict=True):
        p.data.copy_(q)
    resumed.load_state_dict(saved)
    twin = copy.deepcopy(optimizer)
    twin_params = twin.param_groups[0]["params"]
    for own, own_params in ((optimizer, params), (resumed, resumed_params), (twin, twin_params)):
        run(own, own_params, range(3, 6))
    assert same_bits(values(params), values(resumed_params))
    assert same_bits(values(params), values(twin_params))


def test_a_group_that_is_added_later_joins_in():
    optimizer, _ = make()
    optimizer.first_step()
    optimizer.second_step()
    late = make_params([40], torch.bfloat16)
    optimizer.add_param_group({"params": late})
    optimizer.first_step()
    optimizer.second_step()
    assert [group["sam_step"] for group in optimizer.param_groups] == [2, 2]


def test_wider_weights_keep_their_bits():
    results = []
    for rounding in (True, False):
        optimizer, params = make(torch.float32, stochastic_rounding=rounding)
        run(optimizer, params, range(2))
        assert "sam_step" not in optimizer.param_groups[0]
        results.append(values(params))
    assert same_bits(*results)


def test_a_norm_that_is_not_finite_moves_nothing():
    optimizer, params = make()
    start = values(params)
    params[2].grad[3] = float("nan")
    optimizer.first_step()
    assert same_bits(values(params), start)
    optimizer.restore()


@pytest.mark.parametrize("wrong", ["yes", 2, 0.5])
def test_another_value_is_refused(wrong):
    with pytest.raises(ValueError, match="stochastic_rounding must be None, True or False"):
        make(stochastic_rounding=wrong)
