"""Where a parameter's memory is, and whether it is its value: lazy signs, wrappers, what has no gradient."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from cases import buckets_of, give, make_params, normal, same_bits, values
from plain_sam import PlainSAM, furthest
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from sam_fast import SAM

CLOSE = 1e-12  # float64: a few roundings in numbers around 1


def negated(x: Tensor) -> Tensor:
    """``x``, in memory that holds ``-x``."""
    lazy = torch._neg_view(-x)
    assert lazy.is_neg()
    return lazy


# ---- Lazy signs ------------------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="lazy-sign")
@pytest.mark.parametrize("which", ["first", "second", "both"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)
def test_a_gradient_with_a_lazy_sign_counts_as_what_it_is(make, base, which, dtype):
    results = []
    for lazy in (False, True):
        params = make_params([5, 1000, 70000], dtype)
        optimizer = make(params, base, rho=0.5)
        for seed in (1, 2, 3):
            for name, advance in (("first", optimizer.first_step), ("second", optimizer.second_step)):
                gradients = make_params([5, 1000, 70000], dtype, seed=10 * seed + (name == "first"))
                for index, (p, g) in enumerate(zip(params, gradients, strict=True)):
                    p.grad = g.detach().clone()
                    if lazy and index != 1 and which in (name, "both"):
                        p.grad = negated(p.grad)
                advance()
        results.append(values(params))
    assert same_bits(*results)


def test_a_gradient_with_a_lazy_sign_from_a_complex_model(make):
    """y = conj(g) x with g kept as two real parameters: autograd hands over a gradient with is_neg()."""

    def loss(re: Tensor, im: Tensor) -> Tensor:
        return (torch.complex(re, im).conj() * x - (0.8 - 0.6j) * x).abs().square().mean()

    x = normal(64, torch.Generator().manual_seed(0), torch.complex128)
    pairs = [[nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.5, 0.2)] for _ in range(2)]
    optimizer, plain = make(pairs[0], rho=0.01), PlainSAM(pairs[1], rho=0.01, lr=0.1)
    seen = set()
    for _ in range(20):
        for step in ("first_step", "second_step"):
            for pair, each in zip(pairs, (optimizer, plain), strict=True):
                loss(*pair).backward()
                seen.add(pair[1].grad.is_neg())  # type: ignore[union-attr]
                getattr(each, step)()
                each.zero_grad()
    assert True in seen
    assert furthest(*pairs) < CLOSE


@pytest.mark.guarantee(id="lazy-sign")
@pytest.mark.parametrize("when", ["before", "between the steps", "between the passes"])
def test_a_weight_with_a_lazy_sign_is_perturbed_and_comes_back(backend, when):
    """Left to the torch backend, whose operations respect the sign."""
    params, twin = make_params([5, 300], torch.float64), make_params([5, 300], torch.float64)
    if when == "before":
        params[1] = nn.Parameter(negated(params[1].detach()))
        params[1].grad = twin[1].grad.clone()  # type: ignore[union-attr]
        if backend != "torch":
            with pytest.raises(ValueError, match=r"is_neg\(\)"):
                SAM(params, lr=0.1, backend=backend)
            return
    optimizer, plain = SAM(params, lr=0.1, rho=0.5), PlainSAM(twin, lr=0.1, rho=0.5)
    for step in range(3):
        if step == 1 and when == "between the steps":
            params[1].data = negated(params[1].detach())
        before = values(params)
        gradients = make_params([5, 300], torch.float64, seed=step)
        for own in (params, twin):
            for p, g in zip(own, gradients, strict=True):
                p.grad = g.detach().clone()
        optimizer.first_step()
        if step == 1 and when == "between the passes":
            params[1].data = negated(params[1].detach())
        plain.first_step()
        assert furthest(params, twin) < CLOSE
        optimizer.restore()
        assert same_bits(values(params), before)
        optimizer.first_step()
        for own in (params, twin):
            for p, g in zip(own, gradients, strict=True):
                p.grad = g.detach() * 2
        optimizer.second_step()
        plain.second_step()
        assert furthest(params, twin) < CLOSE


@pytest.mark.guarantee(id="lazy-sign")
def test_state_with_a_lazy_sign(make):
    results = []
    for lazy in (False, True):
        params = make_params([40, 7])
        optimizer = make(params, momentum=0.9)
        for step in range(3):
            if step == 2 and lazy:
                state = optimizer.state[params[0]]
                state["momentum_buffer"] = negated(state["momentum_buffer"])
            optimizer.first_step()
            optimizer.second_step()
        results.append(values(params))
    assert same_bits(*results)


# ---- Wrappers --------------------------------------------------------------------------------------------------------


class Named(nn.Parameter):
    """A subclass that stores its elements as every tensor does."""


def test_a_subclass_whose_memory_is_its_value_takes_the_fast_path(make, backend):
    params = [Named(torch.randn(50)), *make_params([30])]
    optimizer = make(params, momentum=0.9)
    for p in params:
        p.grad = torch.ones_like(p).as_subclass(Tensor)
    optimizer.first_step()
    optimizer.second_step()
    assert optimizer.second_step_path == "fused"
    assert {bucket.backend for bucket in buckets_of(optimizer)} == {backend}


def test_a_wrapper_with_a_gradient_is_refused_by_name_and_nothing_has_moved(make):
    plain, inner = make_params([5])[0], torch.randn(4)
    wrapped = nn.Parameter(TwoTensor(inner, inner.clone()))
    optimizer = make([("plain", plain), ("wrapped", wrapped)])
    wrapped.grad = TwoTensor(torch.ones(4), torch.ones(4))
    before = values([plain])
    with pytest.raises(RuntimeError, match=r"'wrapped'.*TwoTensor.*perturb=False"):
        optimizer.first_step()
    assert not optimizer.perturbed
    assert same_bits(values([plain]), before)


# ---- What has no gradient is left alone ------------------------------------------------------------------------------


def odd_parameters() -> dict[str, Any]:
    inner = torch.randn(8)
    return {
        "meta": nn.Parameter(torch.empty(9, device="meta")),
        "meta frozen": nn.Parameter(torch.empty(9, device="meta"), requires_grad=False),
        "sparse CSR": nn.Parameter(torch.eye(3).to_sparse_csr(), requires_grad=False),
        "sparse COO": nn.Parameter(torch.eye(3).to_sparse()),
        "uint8": nn.Parameter(torch.zeros(5, dtype=torch.uint8), requires_grad=False),
        "int8": nn.Parameter(torch.zeros(5, dtype=torch.int8), requires_grad=False),
        "lazy": nn.UninitializedParameter(),
        "wrapper": nn.Parameter(TwoTensor(inner, inner.clone()), requires_grad=False),
        "wrapper with gradients": nn.Parameter(TwoTensor(inner, inner.clone())),
        "quantized": nn.Parameter(torch.quantize_per_tensor(inner, 0.1, 0, torch.quint8), requires_grad=False),
        "no memory": nn.Parameter(torch.ones(4), requires_grad=False),
        "expanded": nn.Parameter(torch.ones(1).expand(50), requires_grad=False),
    }


@pytest.mark.guarantee(id="no-gradient")
@pytest.mark.parametrize("kind", odd_parameters())
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_an_odd_parameter_without_a_gradient_is_left_alone(flatten, kind, base):
    odd = odd_parameters()[kind]
    if kind == "no memory":
        odd.untyped_storage().resize_(0)
    params, twin = make_params([5, 40], torch.float64), make_params([5, 40], torch.float64)
    optimizer = SAM([params[0], odd, params[1]], base, lr=0.01, flatten=flatten)
    plain = PlainSAM(twin, base, lr=0.01)
    for step in range(3):
        for advance in ("first_step", "second_step"):
            give(params, step), give(twin, step)
            getattr(optimizer, advance)()
            getattr(plain, advance)()
        optimizer.zero_grad()
    assert furthest(params, twin) < 1e-9  # RMSprop and AdamW divide by roots
    assert odd.grad is None
    assert sum(bucket.numel for bucket in buckets_of(optimizer)) < 64


@pytest.mark.guarantee(id="no-gradient")
def test_a_lazy_parameter_takes_part_once_it_is_there(flatten):
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.5, flatten=flatten)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    model(x)  # the dry run
    twin = copy.deepcopy(model)
    plain = PlainSAM(twin.parameters(), lr=0.1, rho=0.5)
    for _ in range(3):
        for step in ("first_step", "second_step"):
            for net, each in ((model, optimizer), (twin, plain)):
                net(x).square().mean().backward()
                getattr(each, step)()
                each.zero_grad()
    assert furthest(model.parameters(), twin.parameters()) < 1e-6


@pytest.mark.guarantee(id="no-gradient")
def test_frozen_weights_cost_no_memory_until_they_have_a_gradient(flatten):
    frozen = nn.Parameter(torch.randn(100_000), requires_grad=False)
    address, trainable = frozen.data_ptr(), make_params([30])
    optimizer = SAM([frozen, *trainable], lr=0.1, momentum=0.9, flatten=flatten)
    optimizer.first_step()
    optimizer.second_step()
    assert frozen.data_ptr() == address
    assert sum(bucket.numel for bucket in buckets_of(optimizer)) < 100
    assert trainable[0].grad.untyped_storage().nbytes() < 400
    frozen.requires_grad_()
    frozen.grad = torch.ones_like(frozen)
    before = values([frozen, *trainable])
    optimizer.first_step()
    assert (frozen != before[0]).all()
    optimizer.restore()
    assert same_bits(values([frozen, *trainable]), before)


def test_a_frozen_weight_that_gets_a_gradient_between_the_passes_is_stepped():
    frozen, trainable = nn.Parameter(torch.zeros(4), requires_grad=False), make_params([3])
    optimizer = SAM([frozen, *trainable], lr=0.5)
    optimizer.first_step()
    frozen.grad = torch.ones(4)
    optimizer.second_step()
    assert "had none in first_step" in optimizer.second_step_path
    assert torch.equal(frozen, torch.full((4,), -0.5))


def test_everything_frozen(flatten):
    p = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = SAM([p], lr=0.1, flatten=flatten)
    optimizer.first_step()
    assert float(optimizer.grad_norm) == 0.0
    optimizer.second_step()
    assert torch.equal(p, torch.ones(3))


# ---- Flat gradients that moved ---------------------------------------------------------------------------------------

MOVES = {
    "double": lambda m: m.double(),
    "half and back": lambda m: (m.half(), m.float()),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "meta and back": lambda m: [setattr(p, "data", p.data.clone()) for p in m.parameters()],
    "gradients only": lambda m: [setattr(p.grad, "data", p.grad.data.clone()) for p in m.parameters()],
    "gradients replaced": lambda m: [setattr(p, "grad", p.grad.clone()) for p in m.parameters()],
}


@pytest.mark.guarantee(id="flat-zero")
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("when", ["before the first pass", "between the passes"])
def test_a_gradient_that_was_zeroed_is_zero_whatever_moved(move, when):
    model = nn.Conv2d(3, 2, 3)
    optimizer = SAM(model.parameters(), lr=0.0, flatten=True)
    x = torch.ones(2, 3, 5, 5)

    def backward() -> None:
        model(x.to(model.weight.dtype)).sum().backward()

    backward()
    if when == "between the passes":
        optimizer.first_step(zero_grad=True)
        backward()
    MOVES[move](model)
    if when == "between the passes":
        optimizer.second_step(zero_grad=True)
    else:
        optimizer.zero_grad()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    for _ in range(3):
        backward()
        wanted = torch.autograd.grad(model(x.to(model.weight.dtype)).sum(), list(model.parameters()))
        assert all(torch.allclose(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True))
        optimizer.first_step(zero_grad=True)
        backward()
        optimizer.second_step(zero_grad=True)


# ---- Freed without the garbage collector -----------------------------------------------------------------------------


@pytest.mark.guarantee(id="freed")
def test_deleting_the_optimizer_frees_everything(make):
    gc.collect()
    gc.disable()
    try:
        model = nn.Linear(30, 20)
        optimizer = make(model.parameters(), momentum=0.9)
        for step in (optimizer.first_step, optimizer.second_step):
            model(torch.ones(1, 30)).sum().backward()
            step()
        refs = [weakref.ref(model.weight), weakref.ref(optimizer), *map(weakref.ref, buckets_of(optimizer))]
        del model, optimizer, step
        assert [ref() for ref in refs] == [None] * len(refs)
    finally:
        gc.enable()


def test_gradients_without_memory_of_their_own_count_as_zeros_or_what_they_are(make):
    params, twin = make_params([5, 9], torch.float64), make_params([5, 9], torch.float64)
    optimizer, plain = make(params, rho=0.5), PlainSAM(twin, lr=0.1, rho=0.5)
    for step in range(3):
        give(params, step), give(twin, step)
        params[0].grad = torch._efficientzerotensor(5, dtype=torch.float64)
        twin[0].grad = torch.zeros(5, dtype=torch.float64)
        optimizer.first_step()
        plain.first_step()
        give(params, step + 50), give(twin, step + 50)
        params[1].grad = torch._efficientzerotensor(9, dtype=torch.float64)
        twin[1].grad = torch.zeros(9, dtype=torch.float64)
        optimizer.second_step()
        plain.second_step()
    assert furthest(params, twin) < CLOSE


def test_what_is_frozen_after_the_optimizer_was_made_costs_nothing_either():
    frozen, trainable = nn.Parameter(torch.randn(100_000)), make_params([30])
    optimizer = SAM([frozen, *trainable], lr=0.1)
    frozen.requires_grad_(False)
    optimizer.first_step()
    assert sum(bucket.numel for bucket in buckets_of(optimizer)) < 100
    optimizer.second_step()


def test_a_flat_gradient_of_zeros_does_not_decay_what_was_frozen_since():
    frozen, trainable = make_params([7, 30], grads=False)
    optimizer = SAM([frozen, trainable], lr=0.1, weight_decay=0.5, flatten=True)
    before = values([frozen])
    frozen.requires_grad_(False)
    trainable.grad = torch.ones(30)
    optimizer.first_step()
    trainable.grad = torch.ones(30)
    optimizer.second_step()
    assert same_bits(values([frozen]), before)
