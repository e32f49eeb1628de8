"""Random state that the second pass starts from anew: ``replay_rng``."""

# ruff: noqa: NPY002  # the random numbers of numpy.random itself are meant

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy
import pytest
import torch
from cases import same_bits, values
from torch import nn
from torch.optim import lr_scheduler

from sam_fast import SAM, TrainStep


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


def test_a_string_is_neither_true_nor_false():
    """ "False" was true."""
    dropping = Dropping()
    for option in ("replay_rng", "sync"):
        first_pass = dropping.optimizer.first_pass(dropping.model, **{option: "False"})
        with pytest.raises(ValueError, match=f"{option} must be True or False, got 'False'"), first_pass:
            pass
    with pytest.raises(ValueError, match="replay_rng must be True or False, got 'False'"):
        dropping.optimizer.step(dropping, replay_rng="False")
    assert dropping.masks == []


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
