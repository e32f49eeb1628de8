"""Closures and the two passes: which gradient is the first, gradient synchronisation left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SmallNet, batches, make_params, same_bits, values
from torch import nn
from torch.nn.functional import cross_entropy

from sam_fast import SAM, norm_layers_only

# ---- Closures --------------------------------------------------------------------------------------------------------


class Counter:
    """A closure that counts its calls and returns the number of the call as loss."""

    def __init__(self, params, zero=None) -> None:
        self.params, self.zero, self.calls = params, zero, 0

    def __call__(self) -> Any:
        self.calls += 1
        if self.zero is not None:
            self.zero()
        assert torch.is_grad_enabled()
        sum((p * p).sum() for p in self.params).backward()
        return self.calls


@pytest.mark.guarantee(id="closure-conventions")
def test_closure_after_a_backward_is_the_second_pass(flatten):
    params = make_params([3, 4])
    optimizer = SAM(params, lr=0.1, flatten=flatten)
    optimizer.zero_grad()
    for call in range(1, 4):
        sum((p * p).sum() for p in params).backward()
        closure = Counter(params)
        assert optimizer.step(closure) == 1
        assert closure.calls == 1, call
        optimizer.zero_grad()


@pytest.mark.guarantee(id="closure-conventions")
@pytest.mark.parametrize("zeroes", ["never", "in-closure", "in-closure-to-zero", "after"])
def test_closure_alone_is_both_passes(flatten, zeroes):
    params = make_params([3, 4], grads=False)
    optimizer = SAM(params, lr=0.1, flatten=flatten)
    zero = {
        "in-closure": optimizer.zero_grad,
        "in-closure-to-zero": lambda: optimizer.zero_grad(set_to_none=False),
    }.get(zeroes)
    closure = Counter(params, zero)
    for iteration in range(4):
        with torch.no_grad():
            assert optimizer.step(closure) == 2 * iteration + 1
        assert closure.calls == 2 * (iteration + 1)
        if zeroes == "after":
            optimizer.zero_grad(set_to_none=iteration % 2 == 0)


def test_closure_forms_and_two_calls_give_the_same_bits(flatten):
    nets = [nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    optimizers = [SAM(net.parameters(), lr=0.1, momentum=0.9, flatten=flatten) for net in nets]
    for x, y in batches(4):

        def loss(net, x=x, y=y):
            value = cross_entropy(net(x.flatten(1)), y)
            value.backward()
            return value

        loss(nets[0])
        optimizers[0].first_step(zero_grad=True)
        loss(nets[0])
        optimizers[0].second_step(zero_grad=True)
        loss(nets[1])
        optimizers[1].step(lambda: loss(nets[1]))
        optimizers[1].zero_grad()
        optimizers[2].step(lambda: loss(nets[2]))
    for net in nets[1:]:
        assert same_bits(list(net.parameters()), list(nets[0].parameters()))


# ---- The two passes --------------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="first-pass-sync")
def test_first_pass_without_sync_covers_forward_and_backward():
    events = []

    class Model(nn.Linear):
        def no_sync(self):
            from contextlib import contextmanager

            @contextmanager
            def inside():
                events.append("enter")
                yield
                events.append("exit")

            return inside()

        def forward(self, x):
            events.append("forward")
            return super().forward(x)

    model = Model(3, 1)
    optimizer = SAM(model.parameters(), lr=0.1)
    for sync in (False, True):
        with optimizer.first_pass(model, sync=sync):
            model(torch.ones(1, 3)).sum().backward()
    assert events == ["enter", "forward", "exit", "forward"]


def test_step_inside_second_pass_works(backend):
    model = SmallNet()
    optimizer = SAM(model.parameters(), lr=0.1, backend=backend)
    x, y = batches(1)[0]
    cross_entropy(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    with optimizer.second_pass(model):
        cross_entropy(model(x), y).backward()
        optimizer.step()
    assert not optimizer.perturbed


def test_first_step_may_be_called_inside_first_pass() -> None:
    """The second pass trains what the first had no use for, and weights come back if the rest of the body raises."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = SAM(norm_layers_only(model), lr=0.1)
    before = values(list(model.parameters()))
    x = torch.randn(5, 4)

    def first_pass_that_raises() -> None:
        with optimizer.first_pass(model):
            model(x).square().sum().backward()
            optimizer.first_step(zero_grad=True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        first_pass_that_raises()
    assert not optimizer.perturbed
    assert same_bits(list(model.parameters()), before)
    with optimizer.first_pass(model):
        model(x).pow(3).sum().backward()
        optimizer.first_step(zero_grad=True)
        model(x).pow(3).sum().backward()
        optimizer.second_step()
    assert not any(torch.equal(p, w) for p, w in zip(model[0].parameters(), before, strict=False))


@pytest.mark.parametrize("call", ["second_pass", "second_step"])
def test_a_second_pass_without_synchronisation_is_an_error(call: str) -> None:
    """Replicas would part for good."""
    model = nn.Linear(4, 3)
    optimizer = SAM(model.parameters(), lr=0.1)
    before = values(list(model.parameters()))

    def both_passes() -> None:
        with optimizer.first_pass(model, sync=False):
            model(torch.randn(5, 4)).sum().backward()
            optimizer.first_step()
            if call == "second_step":
                optimizer.second_step()
            else:
                with optimizer.second_pass(model):
                    pass

    with pytest.raises(RuntimeError, match="end the block"):
        both_passes()
    assert same_bits(list(model.parameters()), before)
    with optimizer.first_pass(model, sync=False):
        model(torch.randn(5, 4)).sum().backward()
    optimizer.first_step()
    optimizer.second_step()
