"""step(closure): which passes a closure computes, given explicitly or found out, against plain PyTorch."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from cases import make_params, same_bits, values
from plain_sam import PlainSAM, furthest
from torch import nn
from torch.nn.functional import mse_loss

from sam_fast import SAM

CLOSE = 1e-12


class Loop:
    """A small network in float64, SAM on it and plain SAM on a copy; counts the closure's calls."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.twin = copy.deepcopy(self.model)
        self.optimizer = SAM(self.model.parameters(), rho=0.5, lr=0.1, **options)
        self.plain = PlainSAM(self.twin.parameters(), rho=0.5, lr=0.1)
        self.data = [(torch.randn(16, 4).double(), torch.randn(16, 1).double()) for _ in range(8)]
        self.calls = 0

    def closure(self, step: int) -> Any:
        def call() -> Any:
            self.calls += 1
            loss = mse_loss(self.model(self.data[step][0]), self.data[step][1])
            loss.backward()
            return loss.detach()

        return call

    def plain_step(self, first: int, second: int | None = None) -> None:
        for step, advance in (
            (first, self.plain.first_step),
            (first if second is None else second, self.plain.second_step),
        ):
            mse_loss(self.twin(self.data[step][0]), self.data[step][1]).backward()
            advance()

    def off(self) -> float:
        return furthest(self.model.parameters(), self.twin.parameters())


def saliency(loop: Loop) -> None:
    x = loop.data[7][0].clone().requires_grad_()
    loop.model(x).abs().sum().backward()


LEFT_OVER = {
    "nothing": lambda loop: None,
    "zeroed by the model": lambda loop: loop.model.zero_grad(set_to_none=False),
    "set to None by the model": lambda loop: loop.model.zero_grad(),
    "zeroed by hand": lambda loop: [p.grad.zero_() for p in loop.model.parameters() if p.grad is not None],
    "zeros": lambda loop: [setattr(p, "grad", torch.zeros_like(p)) for p in loop.model.parameters()],
    "zeroed by the optimizer": lambda loop: loop.optimizer.zero_grad(set_to_none=False),
}


@pytest.mark.guarantee(id="closure-passes")
@pytest.mark.parametrize("left", LEFT_OVER)
@pytest.mark.parametrize("mode", ["auto", "both"])
def test_gradients_of_zeros_are_no_first_pass(flatten, left, mode):
    loop = Loop(flatten=flatten, closure=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            LEFT_OVER[left](loop)
            loop.optimizer.step(loop.closure(step))
            loop.plain_step(step)
    assert loop.off() < CLOSE
    assert loop.calls == 12


@pytest.mark.guarantee(id="closure-passes")
@pytest.mark.parametrize("where", ["constructor", "call"])
def test_both_discards_what_is_left_over(flatten, where):
    """Saliency maps, FGSM, logged gradients: of other data, and not zero."""
    loop = Loop(flatten=flatten, **({"closure": "both"} if where == "constructor" else {}))
    options = {} if where == "constructor" else {"passes": "both"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            saliency(loop)
            loop.optimizer.step(loop.closure(step), **options)
            loop.plain_step(step)
    assert loop.off() < CLOSE


@pytest.mark.guarantee(id="closure-passes")
@pytest.mark.parametrize("where", ["constructor", "call", "first_pass"])
def test_second_takes_the_gradients_that_are_there_without_a_word(flatten, where):
    loop = Loop(flatten=flatten, **({"closure": "second"} if where == "constructor" else {}))
    options = {"passes": "second"} if where == "call" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            loop.optimizer.zero_grad()
            if where == "first_pass":
                with loop.optimizer.first_pass(loop.model):
                    loop.closure(7 - step)()
            else:
                loop.closure(7 - step)()
            loop.optimizer.step(loop.closure(step), **options)
            loop.plain_step(7 - step, step)
    assert loop.off() < CLOSE
    assert loop.calls == 8


@pytest.mark.guarantee(id="closure-passes")
def test_auto_warns_once_when_it_takes_gradients_that_were_there(flatten):
    loop = Loop(flatten=flatten)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            loop.closure(step)()
            loop.optimizer.step(loop.closure(step))
            loop.optimizer.zero_grad()
            loop.plain_step(step)
    (warning,) = caught
    assert warning.filename == __file__
    assert 'closure="second"' in str(warning.message)
    assert 'closure="both"' in str(warning.message)
    assert loop.off() < CLOSE


def test_a_zero_gradient_counts_no_step_of_stochastic_rounding():
    optimizer = SAM(make_params([20], torch.bfloat16), lr=0.0, stochastic_rounding=True)
    p = optimizer.param_groups[0]["params"][0]
    for count in (1, 2):
        p.grad = torch.zeros_like(p)
        optimizer.step(lambda: (p * p).sum().backward())
        assert optimizer.param_groups[0]["sam_step"] == count


@pytest.mark.guarantee(id="closure-passes")
@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_closure_while_perturbed_is_the_second_pass(flatten, zero_grad):
    """Frameworks turn second_step into step(closure) with a closure of their own, which may do nothing."""
    loop = Loop(flatten=flatten)
    for step in range(6):
        loop.closure(step)()
        loop.optimizer.first_step(zero_grad=True)
        if step % 2:
            loop.closure(step)()
            assert loop.optimizer.step(lambda: "nothing done") == "nothing done"
        else:
            assert float(loop.optimizer.step(loop.closure(step))) > 0
        loop.optimizer.zero_grad()
        loop.plain_step(step)
    assert loop.off() < CLOSE


@pytest.mark.guarantee(id="closure-passes")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", ["auto", "second"])
def test_gradients_and_a_closure_that_computes_none_are_an_error(flatten, mode):
    """As in Lightning's manual optimization, where step() without first_step would do nothing."""
    loop = Loop(flatten=flatten, closure=mode)
    before = values(list(loop.model.parameters()))
    loop.closure(0)()
    with pytest.raises(RuntimeError, match=r"first_step\(zero_grad=True\) after the first"):
        loop.optimizer.step(lambda: None)
    assert not loop.optimizer.perturbed
    assert same_bits(values(list(loop.model.parameters())), before)


def test_a_closure_while_perturbed_that_raises_restores(flatten):
    loop = Loop(flatten=flatten)
    before = values(list(loop.model.parameters()))
    loop.closure(0)()
    loop.optimizer.first_step(zero_grad=True)

    def fails() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        loop.optimizer.step(fails)
    assert not loop.optimizer.perturbed
    assert same_bits(values(list(loop.model.parameters())), before)


@pytest.mark.parametrize("how", ["closure while perturbed", "second"])
def test_the_random_state_of_first_pass_is_replayed_in_the_closure(how):
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    optimizer, masks = SAM(model.parameters(), lr=0.1), []
    x = torch.ones(4, 6)

    def closure() -> None:
        y = model(x)
        masks.append(y == 0)
        y.sum().backward()

    with optimizer.first_pass(model, replay_rng=True):
        closure()
    after = torch.get_rng_state()
    if how == "closure while perturbed":
        optimizer.first_step(zero_grad=True)
    optimizer.step(closure)
    assert torch.equal(*masks)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_first_pass_that_a_closure_for_both_would_forget_is_refused():
    params = make_params([4])
    optimizer = SAM(params, lr=0.1, closure="both")
    with optimizer.first_pass(nn.ParameterList(params), replay_rng=True):
        pass
    with pytest.raises(ValueError, match=r"step\(closure, replay_rng=True\)"):
        optimizer.step(lambda: None)
    assert not optimizer.perturbed


def test_a_copy_keeps_the_mode():
    optimizer = copy.deepcopy(SAM(make_params([4]), lr=0.1, closure="both"))
    calls = []
    optimizer.step(lambda: calls.append(1))
    assert len(calls) == 2


# ---- Closures of Lightning's automatic optimization ------------------------------------------------------------------


class LightningLike:
    """What Lightning hands to step: it zeroes gradients, unless it adds to those of earlier micro-batches."""

    def __init__(self, closure: Any, zero_grad: Any) -> None:
        self._step_fn, self._zero_grad_fn = closure, zero_grad

    def __call__(self) -> Any:
        if self._zero_grad_fn is not None:
            self._zero_grad_fn()
        return self._step_fn()


def wrapped(model: Any, optimizer: Any, closure: Any) -> Any:
    return closure()


@pytest.mark.filterwarnings("ignore:Lightning's automatic optimization calls training_step for both")
def test_a_lightning_closure_is_called_for_both_whatever_is_left_over():
    loop = Loop()
    for step in range(4):
        saliency(loop)
        loop.optimizer.step(
            partial(wrapped, loop.model, loop.optimizer, LightningLike(loop.closure(step), loop.model.zero_grad))
        )
        loop.plain_step(step)
    assert loop.off() < CLOSE


@pytest.mark.guarantee(id="closure-passes")
@pytest.mark.parametrize("mode", ["auto", "both"])
def test_accumulation_in_lightning_is_an_error(mode):
    loop = Loop(closure=mode)
    before = values(list(loop.model.parameters()))
    loop.closure(0)()  # the first micro-batch
    with pytest.raises(RuntimeError, match=r"SAMCallback\(\)"):
        loop.optimizer.step(partial(wrapped, loop.model, loop.optimizer, LightningLike(loop.closure(1), None)))
    assert not loop.optimizer.perturbed
    assert same_bits(values(list(loop.model.parameters())), before)


@pytest.mark.parametrize("left", ["nothing", "zeroed by the optimizer", "used"])
def test_second_without_a_new_gradient_is_an_error(flatten, left):
    loop = Loop(flatten=flatten, closure="second")
    if left == "used":
        loop.optimizer.step(loop.closure(0), passes="both")
    else:
        loop.optimizer.zero_grad(set_to_none=left == "nothing")
    before, calls = values(list(loop.model.parameters())), loop.calls
    with pytest.raises(RuntimeError, match="backward"):
        loop.optimizer.step(loop.closure(1))
    assert loop.calls == calls
    assert same_bits(values(list(loop.model.parameters())), before)


@pytest.mark.parametrize("ends_with", ["first_step", "second_step", "step", "restore"])
def test_a_closure_that_begins_or_ends_a_step_is_an_error(ends_with: str) -> None:
    """It was three steps in one, in silence, or an error that spoke of something else."""
    loop = Loop(closure="both")
    compute = loop.closure(0)

    def closure() -> Any:
        loss = compute()
        if ends_with == "step":
            loop.optimizer.step(compute)
        elif ends_with == "first_step" or loop.optimizer.perturbed:
            getattr(loop.optimizer, ends_with)()
        return loss

    with pytest.raises(RuntimeError, match=r"closure of step\(closure\) has begun or ended a step itself"):
        loop.optimizer.step(closure)
    assert not loop.optimizer.perturbed
    if ends_with in ("first_step", "restore"):
        assert loop.off() == 0.0


@pytest.mark.parametrize("write", [lambda p, g: p.grad.data.copy_(g), lambda p, g: setattr(p.grad, "data", g)])
def test_a_closure_that_writes_its_gradients_through_data(flatten: bool, write: Any) -> None:
    loop = Loop(flatten=flatten, closure="second")
    params = list(loop.model.parameters())

    def closure() -> None:
        x, y = loop.data[0]
        grads = torch.autograd.grad(mse_loss(loop.model(x), y), params)
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            write(p, g)

    for _ in range(3):
        loop.optimizer.zero_grad()
        loop.closure(0)()
        loop.optimizer.step(closure)
        loop.plain_step(0)
    assert loop.off() < CLOSE


@pytest.mark.parametrize("mode", ["auto", "both", "second"])
def test_gradients_that_were_estimated_in_inference_mode(flatten: bool, mode: str) -> None:
    loop = Loop(flatten=flatten, closure=mode)

    @torch.inference_mode()
    def estimated() -> None:
        for p in loop.model.parameters():
            p.grad = p.clone()

    for _ in range(2):
        loop.optimizer.zero_grad()
        if mode == "second":
            estimated()
        loop.optimizer.step(estimated)
        for advance in (loop.plain.first_step, loop.plain.second_step):
            for p in loop.twin.parameters():
                p.grad = p.detach().clone()
            advance()
    assert loop.off() < CLOSE
