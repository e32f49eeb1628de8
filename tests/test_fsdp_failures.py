"""FSDP2 when a second pass raises: the model holds w again, and nothing of that pass is left in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch
from cases import same_bits, values
from parallel import RHO, SGD, TOLERANCE, batches, my_share, network, one_process, train, weights
from processes import group_of
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

from sam_fast import SAM


def nested(model: nn.Sequential, reshard: bool | int | None = None) -> nn.Sequential:
    """The network in three levels of fully_shard: the last layer is the root's, the first the block's, the one between
    them has a module of its own."""
    first, tanh, inner, *rest = model
    block = nn.Sequential(first, tanh, inner)
    whole = nn.Sequential(block, *rest)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for module in (inner, block, whole):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    return whole


class Failure(Exception):
    """What the tests raise."""


def fail(*_: Any) -> None:
    raise Failure


def fails_backward(_: nn.Module, __: Any, output: Tensor) -> None:
    output.register_hook(fail)


def before_gathering(module: nn.Module) -> Any:
    return module.register_forward_pre_hook(fail, prepend=True)  # before FSDP2's own


def in_forward(module: nn.Module) -> Any:
    return module.register_forward_pre_hook(fail)


def in_backward(module: nn.Module) -> Any:
    return module.register_forward_hook(fails_backward)


PLACES: dict[str, Callable[[nn.Sequential], Any]] = {
    "before anything is gathered": before_gathering,
    "the root is gathered": in_forward,
    "before the block is gathered": lambda model: before_gathering(model[0]),
    "in the block's first layer": lambda model: in_forward(model[0][0]),
    "before the inner module is gathered": lambda model: before_gathering(model[0][2]),
    "in the inner module": lambda model: in_forward(model[0][2]),
    "in the root's layer": lambda model: in_forward(model[2]),
    "in the root's backward": lambda model: in_backward(model[2]),
    "in the backward of the inner module": lambda model: in_backward(model[0][2]),
    "in the backward of the block's first layer": lambda model: in_backward(model[0][0]),
}
"""What makes a pass raise, on all ranks, and where; it returns the handle of the hook."""


class Run:
    """A model, its optimizer and a step that is abandoned, on one rank."""

    def __init__(self, reshard: bool | int | None) -> None:
        self.model = nested(network(), reshard)
        self.params = list(self.model.parameters())
        self.optimizer = SAM(self.params, rho=RHO, **SGD)
        self.data = [my_share(batch) for batch in batches(3)]

    def loss(self) -> Tensor:
        x, y = self.data[0]
        return mse_loss(self.model(x), y)

    def first_step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.first_step(zero_grad=True)

    def given_up(self, second_pass: Callable[[], Any]) -> None:
        self.first_step()
        with suppress(Failure), self.optimizer.second_pass(self.model):
            second_pass()
            raise Failure
        assert not self.optimizer.perturbed

    def check(self) -> None:
        """A forward pass gives that at w, bit for bit."""
        fresh = network()
        (x, _), before = self.data[0], [p.detach().clone() for p in fresh.parameters()]
        with torch.no_grad():
            assert same_bits(list(self.model(x)), list(fresh(x)))
        assert same_bits([p.full_tensor() for p in self.params], before)

    def step(self) -> None:
        """The next steps are those of a run in which nothing happened."""
        self.optimizer.zero_grad()
        train(self.model, self.optimizer, self.data)
        torch.testing.assert_close(weights(self.model), one_process(3), **TOLERANCE)


def raises(place: str, reshard: bool | int | None) -> bool:
    run = Run(reshard)
    for then in (run.check, run.step):

        def second_pass() -> None:
            handle = PLACES[place](run.model)
            try:
                run.loss().backward()
            finally:
                handle.remove()

        run.given_up(second_pass)
        then()
    return True


RESHARD = {"default": None, "reshard": True, "keep": False}


@pytest.mark.guarantee(id="fsdp-given-up")
@pytest.mark.parametrize("reshard", RESHARD.values(), ids=RESHARD.keys())
@pytest.mark.parametrize("place", PLACES)
def test_after_a_pass_that_raises_the_model_holds_w(two, place, reshard):
    assert two.run(raises, place, reshard) == [True, True]


@pytest.mark.parametrize("place", ["in the inner module", "in the backward of the block's first layer"])
def test_also_where_the_weights_are_gathered_from_two_processes_for_the_backward_pass(four, place):
    assert four.run(raises, place, 2) == [True] * 4


def stopped(after: str, style: str) -> bool:
    """Without hooks: the pass ends early, in each style; ``restore`` and a closure know no model."""
    run = Run(None)

    def second_pass() -> None:
        loss = run.loss()
        if after == "backward":
            loss.backward()
        raise Failure

    for then in (run.check, run.step):
        if style == "second_pass":
            run.given_up(second_pass)
        elif style == "restore":
            run.first_step()
            with suppress(Failure):
                second_pass()
            run.optimizer.restore()
        else:
            run.optimizer.zero_grad()
            run.loss().backward()
            with suppress(Failure):
                run.optimizer.step(second_pass)
        then()
    return True


@pytest.mark.guarantee(id="fsdp-given-up")
@pytest.mark.parametrize("style", ["second_pass", "restore", "closure"])
@pytest.mark.parametrize("after", ["forward", "backward"])
def test_a_pass_that_stops_halfway(two, after, style):
    assert two.run(stopped, after, style) == [True, True]


def closure_raises_in_its_first_call() -> bool:
    run = Run(None)

    def closure() -> Tensor:
        loss = run.loss()
        loss.backward()
        return loss

    for then in (run.check, run.step):
        handle = PLACES["in the backward of the inner module"](run.model)
        with suppress(Failure):
            run.optimizer.step(closure, passes="both")
        handle.remove()
        then()
    return True


@pytest.mark.guarantee(id="fsdp-given-up")
def test_a_closure_that_raises_in_its_first_call(two):
    assert two.run(closure_raises_in_its_first_call) == [True, True]


def accumulating() -> bool:
    """The second of two micro-batches raises; those of the first are kept back, unreduced."""
    run = Run(None)

    def second_pass() -> None:
        run.model.set_requires_gradient_sync(False)
        run.loss().backward()
        run.model.set_requires_gradient_sync(True)

    run.given_up(second_pass)
    run.step()
    return True


def test_unreduced_gradients_of_a_pass_that_is_given_up_are_dropped(two):
    assert two.run(accumulating) == [True, True]


def part_of_a_model() -> bool:
    """second_pass is given a part of the model that is not FSDP2's root."""
    run = Run(None)
    run.first_step()
    with suppress(Failure), run.optimizer.second_pass(run.model[0]):
        run.loss()
        raise Failure
    run.check()
    return True


def test_second_pass_of_a_part_of_the_model(two):
    assert two.run(part_of_a_model) == [True, True]


def another_model() -> bool:
    """Only the model whose step is abandoned is reset; another one, in mid-step, goes on."""
    run, other = Run(None), Run(None)
    other.first_step()
    with other.optimizer.second_pass(other.model):
        loss = other.loss()
        run.given_up(lambda: run.loss())
        loss.backward()
    other.optimizer.second_step()
    torch.testing.assert_close(weights(other.model), one_process(1), **TOLERANCE)
    run.check()
    return True


def test_other_models_are_left_alone(two):
    assert two.run(another_model) == [True, True]


def one_gives_up() -> tuple[bool, bool, str]:
    """Rank 1 raises between forward and backward; rank 0 waits for it in its backward pass, until the timeout."""
    run = Run(None)
    before = values([p.to_local() for p in run.params])
    run.first_step()
    text = ""
    try:
        with run.optimizer.second_pass(run.model):
            loss = run.loss()
            if distributed.get_rank() == 1:
                raise RuntimeError("no memory")
            loss.backward()
    except RuntimeError as error:
        text = str(error)
    sharded = all(p is q for p, q in zip(run.model.parameters(), run.params, strict=True))
    return sharded and same_bits([p.to_local() for p in run.params], before), run.optimizer.perturbed, text


def test_fsdp_process_that_raises_leaves_none_perturbed():
    with group_of(2, timeout=2.0) as group:
        found = group.run(one_gives_up)
    assert [(same, perturbed) for same, perturbed, _ in found] == [(True, False)] * 2
    assert found[1][2] == "no memory"
    assert found[0][2] not in ("", "no memory")


def of_another_torch() -> list[str]:
    """A PyTorch whose FSDP2 has changed: one warning, and the exception that the pass raised."""
    run = Run(None)
    run.first_step()
    moved = mock.patch.object(type(run.model), "_get_fsdp_state", return_value=None)
    with moved, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.optimizer.restore()
    return [str(warning.message) for warning in caught]


def test_a_torch_that_has_changed_is_one_warning(two):
    for messages in two.run(of_another_torch):
        assert len(messages) == 1
        assert "build it anew" in messages[0]
