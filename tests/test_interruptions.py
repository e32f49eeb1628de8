"""Whatever raises or is interrupted in a step: the weights come back, and the optimizer goes on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SmallNet, batches, buckets_of, make_params, same_bits, values
from torch.nn.functional import cross_entropy

from sam_fast import SAM, Schedule

Make = Callable[..., SAM]


class Interrupted(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


@pytest.mark.guarantee(id="restore-after-errors")
@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), Interrupted(), KeyboardInterrupt()], ids=["error", "base", "ctrl-c"]
)
def test_weights_come_back_when_the_second_pass_raises(make, error):
    model = SmallNet()
    optimizer = make(model.parameters())
    before = values(list(model.parameters()))
    x, y = batches(1)[0]
    cross_entropy(model(x), y).backward()
    optimizer.first_step()
    assert not same_bits(values(list(model.parameters())), before)
    with pytest.raises(type(error)), optimizer.second_pass(model):
        raise error
    assert not optimizer.perturbed
    assert same_bits(values(list(model.parameters())), before)


@pytest.mark.guarantee(id="restore-after-errors")
def test_weights_come_back_when_the_closure_raises(make):
    params = make_params([10, 20])
    optimizer = make(params)
    before = values(params)

    def closure():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert not optimizer.perturbed
    assert same_bits(values(params), before)


@pytest.mark.guarantee(id="first-step-interrupted")
def test_a_first_step_that_fails_half_way_leaves_no_trace(make, monkeypatch):
    """Two buckets; the second one's perturb raises after the first one has moved."""
    params = [*make_params([100]), *make_params([100], torch.float64)]
    optimizer = make(params)
    before = values(params)
    first, second = buckets_of(optimizer)
    original = type(first).perturb

    def perturb(self, *args):
        if self is second:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(type(first), "perturb", perturb)
    with pytest.raises(KeyboardInterrupt):
        optimizer.first_step()
    assert not optimizer.perturbed
    assert same_bits(values(params), before)


def test_weights_are_back_when_the_base_optimizer_raises(make: Make) -> None:
    params = make_params([10, 20])
    optimizer = make(params, torch.optim.Adam, lr=0.1)
    before = values(params)
    optimizer.first_step()

    def step() -> None:
        raise RuntimeError("base failed")

    optimizer.base_optimizer.step = step  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match="base failed"):
        optimizer.second_step()
    assert not optimizer.perturbed
    assert same_bits(values(params), before)


@pytest.mark.guarantee(id="restore-interrupted")
def test_a_restore_that_was_interrupted_is_finished_by_the_next(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [*make_params([100]), *make_params([100], torch.float64)]
    optimizer = make(params)
    before = values(params)
    optimizer.first_step()
    first, second = buckets_of(optimizer)
    original, calls = type(first).restore, []

    def restore(self: Any, release: bool = True) -> None:
        if self is second and not calls:
            calls.append(1)
            raise KeyboardInterrupt
        original(self, release)

    monkeypatch.setattr(type(first), "restore", restore)
    with pytest.raises(KeyboardInterrupt):
        optimizer.restore()
    assert optimizer.perturbed
    optimizer.restore()
    assert not optimizer.perturbed
    assert same_bits(values(params), before)


def test_a_checkpoint_of_perturbed_weights_is_a_warning(make: Make) -> None:
    """As a signal's handler saves it in the middle of a step."""
    params = make_params([10, 20])
    optimizer = make(params)
    optimizer.first_step()
    with pytest.warns(RuntimeWarning, match=r"a checkpoint of the model is one of w \+ e"):
        optimizer.state_dict()
    optimizer.restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()


@pytest.mark.parametrize("ends", ["deleted", "restored", "stepped", "not perturbed", "copied"])
def test_a_sam_that_is_deleted_while_perturbed_says_so(make: Make, ends: str) -> None:
    """As where an exception that nobody has expected ends a function, and the model is trained on."""
    params = make_params([10, 20])
    optimizer = make(params, schedule=Schedule(start=1) if ends == "not perturbed" else None)
    other = copy.copy(optimizer) if ends == "copied" else None
    optimizer.first_step()
    if ends in ("restored", "stepped"):
        optimizer.restore() if ends == "restored" else optimizer.second_step()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        del optimizer
    assert [str(w.message)[:17] for w in found] == (["a SAM was deleted"] if ends == "deleted" else [])
    if other is not None:
        other.restore()
