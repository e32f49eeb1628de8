"""The hooks that a SAM puts on its base optimizer, for steps that others have it make."""

from __future__ import annotations

import copy
import gc
from typing import Any
from unittest import mock
from weakref import ref

import pytest
import torch
from cases import SmallNet, batches, give_doubles, make_params, same_bits, two_passes, values
from norms import Recorder, unchanged
from reference_loop import backward, reference_step

from sam_fast import SAM, base_step, disable_running_stats, enable_running_stats


@pytest.mark.guarantee(id="statistics-between-steps")
def test_statistics_after_a_step_of_the_base_optimizer() -> None:
    """A variant that perturbs in some steps only. The pass over disabled layers does not count, as in the reference."""
    model = SmallNet()
    optimizer, recorder = SAM(model.parameters(), lr=0.1), Recorder(model)
    for step, (x, y) in enumerate(batches(4)):
        recorder.first_pass(x)
        if step % 2:
            reference_step(model, optimizer, x, y)
        else:
            model.train()
            enable_running_stats(model)
            backward(model, x, y)
            optimizer.zero_grad()
            disable_running_stats(model)
            backward(model, x, y)
            optimizer.base_optimizer.step()
            optimizer.zero_grad()
        assert unchanged(model, recorder.replay())


def test_what_was_set_aside_comes_back_after_a_step_that_raised() -> None:
    params = make_params([5, 30], torch.float64)
    optimizer = SAM(params, torch.optim.Adam, lr=0.1)
    for p in params:
        optimizer.state[p]["mine"] = torch.ones(2)
    handle = optimizer.base_optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    give_doubles(params, 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.base_optimizer.step()
    handle.remove()
    optimizer.base_optimizer.step()
    assert all({"mine", "exp_avg"} <= optimizer.state[p].keys() for p in params)


class Interrupted(dict[str, Any]):
    """An entry at which Ctrl-C comes, once."""

    def clear(self) -> None:
        super().clear()
        if not vars(self):
            self.over = True
            raise KeyboardInterrupt


@pytest.mark.guarantee(id="others-state")
@pytest.mark.parametrize("when", ["before", "while"])
def test_what_is_set_aside_comes_back_after_an_interruption(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params([5, 30], torch.float64)
    optimizer = SAM(params, torch.optim.RMSprop, lr=0.1)
    optimizer.state[params[0]]["mine"] = torch.ones(2)
    optimizer.state[params[1]] = Interrupted(mine=torch.ones(2)) if when == "while" else {"mine": torch.ones(2)}
    if when == "before":
        monkeypatch.setattr(base_step, "_names_in", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        two_passes(optimizer, params, 0)
    monkeypatch.undo()
    optimizer.restore()
    two_passes(optimizer, params, 1)
    assert all({"mine", "square_avg"} <= optimizer.state[p].keys() for p in params)


@pytest.mark.guarantee(id="freed")
def test_hooks_of_sams_that_are_gone_do_not_pile_up() -> None:
    base = torch.optim.SGD(make_params([3]), lr=0.1)
    gc.disable()
    try:
        for _ in range(3):
            SAM(base)
            assert len(base._optimizer_step_pre_hooks) == len(base._optimizer_step_post_hooks) == 1
    finally:
        gc.enable()


def test_a_sam_that_goes_in_the_middle_of_a_step_of_its_base_optimizer() -> None:
    """As where the garbage collector finds it there."""
    base = torch.optim.SGD(make_params([3]), lr=0.1)
    sams = [SAM(base)]
    base.register_step_post_hook(lambda *_: sams.clear())
    base.register_step_post_hook(lambda *_: None)
    base.step()
    base.step()


@pytest.mark.guarantee(id="freed")
@pytest.mark.parametrize("leads_back", ["hook", "attribute"])
def test_a_sam_that_its_base_optimizer_leads_to_is_garbage_when_both_are_gone(leads_back: str) -> None:
    optimizer = SAM(make_params([3]), lr=0.1)
    base = optimizer.base_optimizer
    if leads_back == "hook":
        base.register_step_post_hook(lambda *_, optimizer=optimizer: None)
    else:
        base.owner = optimizer  # type: ignore[attr-defined]
    gone = ref(optimizer)
    del optimizer, base
    gc.collect()
    assert gone() is None


class CopiesAll(torch.optim.Optimizer):
    """Copies every attribute, hooks as well; its state has a name that its code does not show."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        return vars(self)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state, name = self.state[p], "".join(("momen", "tum"))
                state[name] = 0.9 * state[name] + p.grad if state else p.grad.clone()
                p -= group["lr"] * state[name]


def test_copies_of_a_base_optimizer_that_copies_its_hooks() -> None:
    optimizer = SAM(make_params([5], torch.float64), CopiesAll)
    for _ in range(3):
        params = optimizer.param_groups[0]["params"]
        two_passes(optimizer, params, 0)
        optimizer = copy.deepcopy(optimizer)
        assert len(optimizer.base_optimizer._optimizer_step_pre_hooks) == 1
    params = optimizer.param_groups[0]["params"]
    optimizer._base_step._foreign.add("mine")  # as where there was an entry of somebody else's
    alone: Any = copy.deepcopy(optimizer.base_optimizer)
    theirs = alone.param_groups[0]["params"]
    give_doubles(params, 1), optimizer.base_optimizer.step()
    give_doubles(theirs, 1), alone.step()
    assert same_bits(values(params), values(theirs))


def test_a_step_that_cannot_put_back_what_was_set_aside_is_over() -> None:
    """Else a later step of the base optimizer would be taken for SAM's own, and go on from w + e."""
    params = make_params([5], torch.float64)
    optimizer = SAM(params, torch.optim.RMSprop, lr=0.1)
    optimizer.state[params[0]]["mine"] = torch.ones(2)
    handle = optimizer.base_optimizer.register_step_post_hook(lambda base, *_: base.state.update({params[0]: None}))
    with pytest.raises(TypeError):
        two_passes(optimizer, params, 0)
    handle.remove()
    optimizer.restore()
    optimizer.state.clear()
    give_doubles(params, 1)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"w \+ e"):
        optimizer.base_optimizer.step()
