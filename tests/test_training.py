"""Whole training runs: against the float64 reference, with every base optimizer, resumed, accumulated."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SmallNet, batches, same_bits, same_step, values
from plain_sam import PlainSAM, furthest
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrize import cached, register_parametrization
from torch.utils.data import DataLoader, TensorDataset

from sam_fast import SAM, TrainStep, frozen_running_stats
from sam_fast.reference import ReferenceSAM

Groups = Callable[[nn.Module], list[dict[str, Any]]]


def one_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def several_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights, biases and norms apart, each with options of its own."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": matrices[:2], "rho": 0.1, "weight_decay": 1e-3},
        {"params": matrices[2:], "adaptive": True, "rho": 0.5, "eta": 0.01},
        {"params": vectors[:4], "perturb": False},
        {"params": vectors[4:], "lr": 0.01, "rho": 0.0},
    ]


CASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], Groups]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}, one_group),
    "momentum-decay": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}, one_group),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}, one_group),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.05}, one_group),
    "momentum-groups": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}, several_groups),
    "adamw-groups": (torch.optim.AdamW, {"lr": 1e-3}, several_groups),
}


def step(model: nn.Module, optimizer: SAM | ReferenceSAM, x: torch.Tensor, y: torch.Tensor) -> None:
    """One SAM step in the two-call form, statistics frozen in the second pass."""
    cross_entropy(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    with frozen_running_stats(model):
        cross_entropy(model(x), y).backward()
    optimizer.second_step(zero_grad=True)


@pytest.mark.parametrize("adaptive", [False, True], ids=["", "adaptive"])
@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_follow_the_float64_reference(case, adaptive, backend, flatten):
    """Each step starts both from the same float32 weights and momentum; then float64 against float32, one step.

    The bound is per step, so that it need not grow with the chaos of training: a float32 forward and backward of this
    net is right to about 1e-5 of the largest gradient, the weights are rounded to 6e-8, and AdamW divides by the
    gradient's own size, so that where a gradient is nearly zero (up to the rounding of its sum) its step may differ by
    up to the learning rate: bounded by 2 lr there, by lr/100 for almost all.
    """
    base, options, make_groups = CASES[case]
    sam_options = {"rho": 0.5 if adaptive else 0.05, "adaptive": adaptive}
    model = SmallNet()
    optimizer = SAM(make_groups(model), base, **sam_options, **options, flatten=flatten, backend=backend)
    lr = options["lr"]
    for x, y in batches(50 if case == "sgd" else 10):
        exact = copy.deepcopy(model).double()
        reference = ReferenceSAM(make_groups(exact), base, **sam_options, **options)
        reference.base_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        exact.zero_grad()
        step(exact, reference, x.double(), y)
        step(model, optimizer, x, y)
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            error = (p.double() - q).abs().detach()
            if base is torch.optim.AdamW:
                assert float(error.max()) <= 2 * lr
                assert float((error <= lr / 100).double().mean()) > 0.97
            else:
                assert float(error.max()) <= 2e-5 * lr + 2e-7 * float(q.detach().abs().max())


# ---- Every base optimizer --------------------------------------------------------------------------------------------


def dense_optimizers() -> list[Any]:
    """Every torch.optim class that takes dense gradients and no closure, plain and in its foreach and
    fused variants.
    """
    found = []
    for name, cls in sorted(vars(torch.optim).items()):
        if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)) or name in (
            "Optimizer",
            "SparseAdam",
            "LBFGS",
            "Adadelta",
        ):
            continue
        found.append(pytest.param(cls, {}, id=name))
        names = inspect.signature(cls).parameters
        found += [
            pytest.param(cls, {flag: True}, id=f"{name}-{flag}") for flag in ("foreach", "fused") if flag in names
        ]
    return found


@pytest.mark.guarantee(id="every-optimizer")
@pytest.mark.parametrize(("base", "options"), dense_optimizers())
def test_every_base_optimizer_steps_as_it_does_alone(base, options, flatten):
    """SAM's update is the base optimizer's, at w, with the gradient found at w + e, as stepping it by hand."""
    torch.manual_seed(1)
    shapes = [(4, 3), (3, 5)] if base.__name__ == "Muon" else [(4, 3), (5,), ()]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    try:
        by_hand = base(alone, lr=0.01, **options)
        for p in alone:
            p.grad = torch.randn_like(p)
        by_hand.step()
        for p, q in zip(params, alone, strict=True):
            q.data.copy_(p)
        by_hand = base(alone, lr=0.01, **options)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"not on this device: {error}")
    optimizer = SAM(params, base, lr=0.01, flatten=flatten, **options)
    for _ in range(3):
        first, second = [torch.randn_like(p) for p in params], [torch.randn_like(p) for p in params]
        for p, g in zip(params, first, strict=True):
            p.grad = g.clone()
        optimizer.first_step(zero_grad=True)
        for p, q, g in zip(params, alone, second, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        optimizer.second_step(zero_grad=True)
        by_hand.step()
        assert same_step(base, params, alone)


# ---- Stopping and going on -------------------------------------------------------------------------------------------


# ---- Accumulation and long runs --------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="accumulation")
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_equal_the_big_batch(parts, backend, flatten):
    """In float64, so that only the order of sums differs; in eval mode, since BatchNorm sees micro-batches."""
    model = SmallNet().double().eval()
    twin = copy.deepcopy(model)
    big = SAM(model.parameters(), lr=0.05, momentum=0.9, backend=backend, flatten=flatten)
    small = SAM(twin.parameters(), lr=0.05, momentum=0.9, backend=backend, flatten=flatten)
    for x, y in batches(5):
        x = x.double()
        step(model, big, x, y)
        for half in (small.first_step, small.second_step):
            for micro_x, micro_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (cross_entropy(twin(micro_x), micro_y) / parts).backward()
            half(zero_grad=True)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.guarantee(id="restore")
def test_a_thousand_steps_without_a_learning_rate_change_no_bit(backend, flatten):
    model = SmallNet()
    optimizer = SAM(model.parameters(), lr=0.0, rho=0.3, backend=backend, flatten=flatten)
    before = [p.detach().clone() for p in model.parameters()]
    data = batches(4)
    for i in range(1000):
        x, y = data[i % 4]
        if i % 100 == 0:
            step(model, optimizer, x, y)
            continue
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.first_step()
        optimizer.second_step(zero_grad=True)
    assert same_bits(list(model.parameters()), before)


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT


@pytest.mark.guarantee(id="stale-graph")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("by_closure", [False, True])
def test_what_parametrizations_keep_is_made_of_the_weights_as_they_are(base, by_closure):
    """The backward pass of this one needs no saved tensors: a second one through the old graph raises nothing."""
    model = register_parametrization(nn.Linear(4, 4).double(), "weight", Symmetric())
    twin = copy.deepcopy(model)
    optimizer, plain = SAM(model.parameters(), base, rho=0.5, lr=0.1), PlainSAM(twin.parameters(), base, 0.5, lr=0.1)
    x = torch.randn(6, 4, dtype=torch.float64)

    def backward(model: nn.Module) -> torch.Tensor:
        loss = model(x).tanh().square().mean()
        loss.backward()
        return loss

    with cached():
        for _ in range(3):
            if by_closure:
                optimizer.step(lambda: backward(model), passes="both")
            else:
                backward(model)
                optimizer.first_step(zero_grad=True)
                backward(model)
                optimizer.second_step(zero_grad=True)
    for _ in range(3):
        backward(twin)
        plain.first_step()
        backward(twin)
        plain.second_step()
    assert furthest(model.parameters(), twin.parameters()) < 1e-9


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_with_rho_0_and_the_same_masks_it_is_the_base_optimizer(base: type[torch.optim.Optimizer]) -> None:
    """Also the order of a DataLoader, which shuffles with the generator that dropout draws from."""

    def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model(x), y)

    rows, found = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,))), []
    for with_sam in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        plain = base(model.parameters(), lr=0.05)
        sam_step = TrainStep(model, SAM(plain, rho=0.0), loss_of, replay_rng=True)
        for _ in range(3):
            for x, y in DataLoader(rows, batch_size=8, shuffle=True):
                if with_sam:
                    sam_step(x, y)
                else:
                    plain.zero_grad()
                    loss_of(model, x, y).backward()
                    plain.step()
        found.append(values([*model.parameters(), *model.buffers()]))
    assert same_bits(*found)
