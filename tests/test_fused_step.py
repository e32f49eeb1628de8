"""The second step in one pass: the same as restore and the base optimizer's own step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import EPSILON, SIZES, each_dtype, give, make_params, same_bits, same_step, values
from fused_runs import run, two_groups, without
from torch import nn

from sam_fast import SAM

SGD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.01},
    "momentum": {"momentum": 0.9},
    "momentum-decay": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov-decay-maximize": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
}
ADAM_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "amsgrad-decay-maximize": {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    "betas": {"betas": (0.5, 0.9), "eps": 1e-3},
}
CASES = [
    *((torch.optim.SGD, options) for options in SGD_OPTIONS.values()),
    *((torch.optim.Adam, options) for options in ADAM_OPTIONS.values()),
    *((torch.optim.AdamW, options) for options in ADAM_OPTIONS.values()),
]
IDS = [
    *(f"SGD-{name}" for name in SGD_OPTIONS),
    *(f"{base}-{name}" for base in ("Adam", "AdamW") for name in ADAM_OPTIONS),
]
bases = pytest.mark.parametrize(("base", "options"), CASES, ids=IDS)


@pytest.mark.not_interpreted
@each_dtype
@bases
def test_a_hundred_steps_are_those_of_the_base_optimizer(base, options, dtype, was_fused):
    """SGD in float32 and float64: the same bits, weights and state. Adam: PyTorch's square root is MKL's, not always
    rounded correctly. With 16 bits PyTorch's default rounds every intermediate result to 16 bits; its fused step
    computes in float32, as this one, but in another order."""
    steps, sizes = 100, [5, 0, 17, 4003]
    params = make_params(sizes, dtype)
    narrow = dtype in (torch.bfloat16, torch.float16)
    options = {**options, "fused": True} if narrow else options
    optimizer = two_groups(params, base, **options)
    run(optimizer, params, steps)
    # With dampening PyTorch's first step is another one, which the base optimizer takes.
    assert was_fused == [options.get("dampening", 0) == 0, *[True] * (steps - 1)]
    twin = make_params(sizes, dtype)
    oracle = without(two_groups(twin, base, **options))
    run(oracle, twin, steps)
    if base is torch.optim.SGD and not narrow:
        assert same_bits(values(params), values(twin))
        buffers = [
            [own.state[p].get("momentum_buffer", p) for p in ps] for own, ps in ((optimizer, params), (oracle, twin))
        ]
        assert same_bits(*buffers)
        return
    lr, eps = 1e-2, EPSILON[dtype]
    # Each step rounds w once more (half a unit each in both runs) and moves it by at most a few lr.
    bound = (100 if narrow else 4) * eps * 1.0 + 64 * eps * lr * steps
    for p, q in zip(params, twin, strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=0.0, atol=bound)
        state, expected = optimizer.state[p], oracle.state[q]
        assert state.keys() == expected.keys()
        for name in state:
            if name == "step":
                assert torch.equal(state[name], expected[name])
            elif not narrow:
                assert torch.allclose(state[name], expected[name], rtol=200 * eps, atol=200 * eps * 1e-2)


@pytest.mark.not_interpreted
@pytest.mark.parametrize(("base", "options"), CASES[len(SGD_OPTIONS) :], ids=IDS[len(SGD_OPTIONS) :])
def test_adams_state_has_the_same_bits_and_its_step_is_one_rounding_away(base, options, was_fused):
    """From the same weights, gradients and state, in float32."""
    params, twin = make_params(SIZES), make_params(SIZES)
    optimizer, oracle = two_groups(params, base, **options), without(two_groups(twin, base, **options))
    give(params, 1, 0.01)
    optimizer.first_step()
    optimizer.second_step()
    oracle.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, twin, strict=True):
        q.data.copy_(p.detach())
    before = values(params)
    for each, own in ((optimizer, params), (oracle, twin)):
        give(own, 2, 0.01)
        each.first_step()
        give(own, 3, 0.01)
        each.second_step()
    assert was_fused[-2:] == [True, False]
    for p, q, w in zip(params, twin, before, strict=True):
        assert all(torch.equal(optimizer.state[p][name], oracle.state[q][name]) for name in optimizer.state[p])
        # A unit of the square root is at most 2^-23 of it, and so of the step, which is at most 0.03 long; then it is
        # rounded to w's units.
        assert bool(((p - q).abs() <= 2.0**-22 * 0.03 + 2.0**-23 * w.abs()).all())


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_checkpoints_move_between_sam_and_its_base(base, was_fused):
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    params = make_params([100, 7, 3])
    optimizer = SAM(params, base, lr=0.1, **options)
    run(optimizer, params, 3)
    plain_params = make_params([100, 7, 3])
    plain = base(plain_params, lr=0.1, **options)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, plain_params, strict=True):
        assert all(torch.equal(optimizer.state[p][name], plain.state[q][name]) for name in optimizer.state[p])
    for q in plain_params:
        q.grad = torch.ones_like(q)
    plain.step()
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    was_fused.clear()
    run(optimizer, params, 1, first=10)
    assert was_fused == [True]


@pytest.mark.guarantee(id="restore-vanishing-gradients")
def test_a_gradient_that_vanishes_or_appears_between_the_passes(was_fused):
    params = make_params([100, 40_000, 300, 50])
    before = values(params)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1)
    params[1].grad = None
    optimizer.first_step()
    params[0].grad = None
    params[1].grad = torch.ones_like(params[1])
    optimizer.second_step()
    assert was_fused == [True]
    assert same_bits([params[0]], [before[0]])
    assert torch.equal(params[1], before[1] - 0.1)
    for i in (2, 3):
        assert torch.allclose(params[i], before[i] - 0.1 * params[i].grad, rtol=0, atol=1e-7)


def test_a_group_that_is_not_perturbed_steps_too(was_fused):
    params = make_params([100, 200])
    before = values(params)
    optimizer = SAM([{"params": params[:1], "perturb": False}, {"params": params[1:]}], torch.optim.SGD, lr=0.1)
    optimizer.first_step()
    optimizer.second_step()
    assert was_fused == [True]
    for p, w in zip(params, before, strict=True):
        assert torch.allclose(p, w - 0.1 * p.grad, rtol=0, atol=1e-7)


def test_gradients_of_another_layout(was_fused):
    p = nn.Parameter(torch.randn(30, 40))
    before = p.detach().clone()
    optimizer = SAM([p], torch.optim.SGD, lr=0.1)
    p.grad = torch.randn(40, 30).t()
    optimizer.first_step()
    optimizer.second_step()
    assert was_fused == [True]
    assert torch.allclose(p, before - 0.1 * p.grad, rtol=1e-6, atol=1e-7)


def test_a_norm_that_is_not_finite_makes_it_an_ordinary_step(was_fused):
    params = make_params([100, 200])
    before = values(params)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1)
    params[0].grad[3] = float("nan")
    optimizer.first_step()
    give(params, 5, 0.01)
    optimizer.second_step()
    assert was_fused == [True]
    for p, w in zip(params, before, strict=True):
        assert torch.allclose(p, w - 0.1 * p.grad, rtol=0, atol=1e-7)


def test_options_are_read_anew_in_every_step(was_fused):
    params = make_params([100])
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: [1.0, 0.0, 0.5][epoch])
    moved = []
    for _ in range(3):
        before = params[0].detach().clone()
        optimizer.first_step()
        optimizer.second_step()
        moved.append(not torch.equal(before, params[0]))
        scheduler.step() if len(moved) < 3 else None
    assert moved == [True, False, True]
    assert was_fused == [True, True, True]


@pytest.mark.guarantee(id="stale-graph")
def test_writing_weights_is_visible_to_autograd():
    p = make_params([10])[0]
    optimizer = SAM([p], torch.optim.SGD, lr=0.1)
    optimizer.first_step()
    version = p._version
    loss = (p * p).sum()
    optimizer.second_step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_under_a_gradient_scaler_it_is_the_same_step(scale, was_fused):
    """A power of two changes no bit; an overflow in the second pass leaves weights and state as they were."""
    params, twin = make_params([100, 3000]), make_params([100, 3000])
    optimizer = SAM(params, torch.optim.AdamW, lr=0.1, perturb_eps=0.0)
    plain = SAM(twin, torch.optim.AdamW, lr=0.1, perturb_eps=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    scaler.scale(torch.ones(()))  # the scaler makes its scale when it is first used
    for step in range(5):
        overflows = step == 3
        for each, own in ((plain, twin), (optimizer, params)):
            if each is plain and overflows:
                continue
            factor = scaler.get_scale() if each is optimizer else 1.0
            for seed, take in ((2 * step, "first"), (2 * step + 1, "second")):
                give(own, seed, 0.01)
                for p in own:
                    p.grad.mul_(factor)
                if take == "first":
                    each.first_step()
            if each is plain:
                each.second_step()
                continue
            if overflows:
                own[1].grad[7] = float("inf")
            scaler.step(each)
            scaler.update()
            assert not each.perturbed
    assert scaler.get_scale() == scale / 2
    # The step that overflowed does not count.
    assert was_fused == [True, True, True, True, True, True, False, True, True]
    assert same_bits(values(params), values(twin))
    for p, q in zip(params, twin, strict=True):
        assert all(torch.equal(optimizer.state[p][name], plain.state[q][name]) for name in plain.state[q])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_flattened_parameters_take_the_same_step(base, backend, was_fused):
    results = []
    for flatten in (False, True):
        params = make_params([5, 0, 17, 4003, 1, 100])
        options: dict[str, Any] = {"momentum": 0.9} if base is torch.optim.SGD else {}
        groups = [{"params": params[:2]}, {"params": params[2:5], "lr": 3e-3}, {"params": params[5:], "perturb": False}]
        optimizer = SAM(groups, base, lr=1e-2, flatten=flatten, backend=backend, **options)
        for step in range(6):
            for seed, advance in ((2 * step, optimizer.first_step), (2 * step + 1, optimizer.second_step)):
                give(params, seed, 0.01)
                if step == 4 and advance == optimizer.second_step:
                    params[3].grad = None  # restored, but not stepped
                advance()
        state = [t for p in params for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
        results.append([*values(params), *state])
        assert was_fused == [True] * 6
        was_fused.clear()
    assert same_bits(*results)


@pytest.mark.guarantee(id="copies")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_learning_rate_in_a_tensor_is_read_in_every_step(base, was_fused):
    results = []
    for rate in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        params = make_params([100, 7])
        optimizer = SAM(params, base, lr=rate)
        for step in range(4):
            give(params, step, 0.01)
            optimizer.first_step()
            optimizer.second_step()
            if isinstance(rate, torch.Tensor):
                rate.mul_(0.5)
            else:
                optimizer.param_groups[0]["lr"] *= 0.5
        results.append(values(params))
        assert was_fused[1:] == [True, True, True]
        was_fused.clear()
    assert same_step(base, *results)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_parameter_without_elements_counts_its_steps_once(backend):
    params = make_params([0, 5])
    optimizer = SAM(params, torch.optim.AdamW, lr=0.1, backend=backend)
    for step in range(1, 4):
        give(params, step, 0.01)
        optimizer.first_step()
        optimizer.second_step()
        assert [float(optimizer.state[p]["step"]) for p in params] == [step, step]
