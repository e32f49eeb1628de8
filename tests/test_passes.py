"""Closures and the two passes: which gradient is the first, random state replayed, gradient
synchronisation left out.
"""

# ruff: noqa: NPY002  # the random numbers of numpy.random itself are meant

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy
import pytest
import torch
from cases import SmallNet, batches, make_params, same_bits, values
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from sam_fast import SAM, TrainStep, norm_layers_only

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


def dropout_masks(replay: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The masks of both passes, and what is drawn next."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(20, 50), nn.Dropout(0.5))
    optimizer = SAM(model.parameters(), lr=0.1)
    x, masks = torch.ones(4, 20), []
    with optimizer.first_pass(model, replay_rng=replay):
        out = model(x)
        out.sum().backward()
        masks.append(out == 0)
    optimizer.first_step(zero_grad=True)
    torch.rand(7)  # something draws between the passes
    with optimizer.second_pass(model):
        out = model(x)
        out.sum().backward()
        masks.append(out == 0)
    optimizer.second_step()
    return masks[0], masks[1], torch.rand(3)


@pytest.mark.guarantee(id="replay-rng")
def test_replay_draws_the_same_masks_and_the_stream_goes_on_as_if_nothing_had_been_drawn():
    first, second, after = dropout_masks(replay=True)
    assert torch.equal(first, second)
    torch.manual_seed(5)
    nn.Sequential(nn.Linear(20, 50), nn.Dropout(0.5))(torch.ones(4, 20))
    torch.rand(7)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.guarantee(id="replay-rng")
@pytest.mark.parametrize("replay", [False, True])
def test_replay_mixes_up_alike_whoever_draws(replay):
    """As mixup does in a training step, with Python's or NumPy's random numbers."""
    drawn: list[tuple[float, float]] = []
    model = nn.Linear(3, 1)

    def mixed_up(model, x):
        drawn.append((random.random(), numpy.random.beta(0.2, 0.2)))
        return model(x).mean() * sum(drawn[-1])

    random.seed(3), numpy.random.seed(3)
    step = TrainStep(model, SAM(model.parameters(), lr=0.1), mixed_up, replay_rng=replay)
    for _ in range(2):
        step(torch.ones(2, 3))
    assert (drawn[0] == drawn[1]) is (drawn[2] == drawn[3]) is replay
    assert drawn[0] != drawn[2]
    after = random.random(), numpy.random.beta(0.2, 0.2)
    random.seed(3), numpy.random.seed(3)
    stream = [(random.random(), numpy.random.beta(0.2, 0.2)) for _ in range(5)]
    assert after == stream[2 if replay else 4]


def test_without_replay_the_masks_differ():
    first, second, _ = dropout_masks(replay=False)
    assert not torch.equal(first, second)


@pytest.mark.guarantee(id="replay-rng")
@pytest.mark.parametrize("each_first", [False, True])
@pytest.mark.parametrize("each_second", [False, True])
def test_replay_draws_the_same_masks_for_all_micro_batches(each_first, each_second):
    model = nn.Sequential(nn.Linear(20, 50), nn.Dropout(0.5))
    optimizer = SAM(model.parameters(), lr=0.1)

    def masks_in(entered: Any, each: bool) -> list[torch.Tensor]:
        masks = []
        with contextlib.nullcontext() if each else entered():
            for x in torch.ones(3, 4, 20):
                with entered() if each else contextlib.nullcontext():
                    out = model(x)
                    out.sum().backward()
                    masks.append(out == 0)
        return masks

    def first_pass() -> Any:
        torch.rand(int(each_first))  # something draws between the micro-batches
        return optimizer.first_pass(model, replay_rng=True)

    def second_pass() -> Any:
        return optimizer.second_pass(model)

    masks_in(first_pass, each_first)
    optimizer.zero_grad()  # given up: it is none of the next step's
    for _ in range(2):
        first = masks_in(first_pass, each_first)
        optimizer.first_step(zero_grad=True)
        second = masks_in(second_pass, each_second)
        optimizer.second_step(zero_grad=True)
        if each_second or not each_first:
            assert torch.equal(torch.stack(first), torch.stack(second))
        else:  # the second pass does not know of what was drawn in between
            assert torch.equal(first[0], second[0])


class Dropping:
    """A closure that keeps its dropout masks, and raises in the given call."""

    def __init__(self, raises: int = 0) -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(20, 50), nn.Dropout(0.5))
        self.optimizer = SAM(self.model.parameters(), lr=0.1)
        self.masks: list[torch.Tensor] = []
        self.raises = raises

    def __call__(self) -> None:
        out = self.model(torch.ones(4, 20))
        out.sum().backward()
        self.masks.append(out == 0)
        if len(self.masks) == self.raises:
            raise RuntimeError("closure failed")


def after_passes(passes: int) -> torch.Tensor:
    """The random state after so many passes."""
    with torch.random.fork_rng():
        dropping = Dropping()
        for _ in range(passes):
            dropping()
        return torch.get_rng_state()


@pytest.mark.guarantee(id="replay-rng")
def test_replay_in_a_closure_draws_the_same_masks_in_both_passes_and_others_in_the_next_step():
    dropping = Dropping()
    for steps in range(1, 4):
        dropping.optimizer.step(dropping, replay_rng=True)
        assert torch.equal(torch.get_rng_state(), after_passes(steps))
    masks = dropping.masks
    assert all(torch.equal(masks[2 * i], masks[2 * i + 1]) for i in range(3))
    assert not any(torch.equal(masks[2 * i], masks[2 * j]) for i in range(3) for j in range(i))


def test_without_replay_a_closures_masks_differ():
    dropping = Dropping()
    dropping.optimizer.step(dropping)
    assert not torch.equal(*dropping.masks)
    assert torch.equal(torch.get_rng_state(), after_passes(2))


def test_replay_in_a_closure_is_the_two_passes():
    dropping, twin = Dropping(), Dropping()
    twin.model.load_state_dict(dropping.model.state_dict())
    torch.manual_seed(6)
    dropping.optimizer.step(dropping, replay_rng=True)
    torch.manual_seed(6)
    with twin.optimizer.first_pass(twin.model, replay_rng=True):
        twin()
    twin.optimizer.first_step(zero_grad=True)
    with twin.optimizer.second_pass(twin.model):
        twin()
    twin.optimizer.second_step()
    assert same_bits(list(dropping.model.parameters()), list(twin.model.parameters()))


@pytest.mark.parametrize("raises", [False, True], ids=["", "raises"])
def test_the_stream_goes_on_where_a_closures_first_pass_ended_whatever_the_second_has_drawn(raises):
    dropping = Dropping(raises=2 if raises else 0)

    def closure() -> None:
        if dropping.masks:
            torch.rand(7)
        dropping()

    with contextlib.suppress(RuntimeError):
        dropping.optimizer.step(closure, replay_rng=True)
    assert len(dropping.masks) == 2
    assert torch.equal(torch.get_rng_state(), after_passes(1))


@pytest.mark.parametrize("raises", [1, 2], ids=["first-pass", "second-pass"])
def test_a_closure_that_raises_leaves_the_stream_after_its_first_pass(raises):
    dropping = Dropping(raises)
    with pytest.raises(RuntimeError, match="closure failed"):
        dropping.optimizer.step(dropping, replay_rng=True)
    assert torch.equal(torch.get_rng_state(), after_passes(1))
    dropping.optimizer.step(dropping)  # nothing of the abandoned step is replayed
    assert not any(torch.equal(mask, dropping.masks[0]) for mask in dropping.masks[raises:])


def test_replay_is_refused_where_the_first_pass_was_not_seen(flatten):
    dropping = Dropping()
    optimizer = SAM(dropping.model.parameters(), lr=0.1, flatten=flatten)
    optimizer.zero_grad()
    dropping()
    before, state = values(list(dropping.model.parameters())), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"not seen.*first_pass\(model, replay_rng=True\)"):
        optimizer.step(dropping, replay_rng=True)
    assert len(dropping.masks) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(values(list(dropping.model.parameters())), before)
    optimizer.step(dropping)  # the gradients are still there, and still the first pass
    assert len(dropping.masks) == 2


@pytest.mark.parametrize("perturbed", [True, False])
def test_replay_without_a_closure_is_refused(perturbed):
    dropping = Dropping()
    dropping()
    if perturbed:
        dropping.optimizer.first_step()
    with pytest.raises(ValueError, match="needs a closure"):
        dropping.optimizer.step(replay_rng=True)
    assert dropping.optimizer.perturbed is perturbed


def test_replay_passes_through_schedulers_hooks_the_profiler_and_a_disabled_scaler():
    dropping, seen = Dropping(), []
    lr_scheduler.ConstantLR(dropping.optimizer)
    dropping.optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(kwargs))
    with torch.profiler.profile():
        dropping.optimizer.step(dropping, replay_rng=True)
        torch.amp.GradScaler("cpu", enabled=False).step(dropping.optimizer, dropping, replay_rng=True)
    assert seen == [{"replay_rng": True}] * 2
    masks = dropping.masks
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])


@pytest.mark.parametrize("end", ["second_step", "restore"])
def test_a_random_state_that_nobody_replayed_ends_with_its_step(end):
    model = nn.Linear(3, 2)
    optimizer = SAM(model.parameters(), lr=0.1)
    with optimizer.first_pass(model, replay_rng=True):
        model(torch.ones(1, 3)).sum().backward()
    optimizer.first_step()
    getattr(optimizer, end)()
    optimizer.first_step()
    before = torch.get_rng_state()
    with optimizer.second_pass(model):
        drawn = torch.rand(1)
    torch.set_rng_state(before)
    assert torch.equal(drawn, torch.rand(1))


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
