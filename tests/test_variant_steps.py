"""A ``step`` of somebody's own that does not lead to SAM's: ``second_step`` does without it, as in the reference
implementation, whose ``second_step`` knows nothing of ``step``.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from cases import give_doubles, make_params, two_passes
from plain_sam import PlainSAM, furthest

from sam_fast import SAM

CLOSE = 1e-12


class DoesNothing(SAM):
    """For a Trainer that calls step() after a training_step that has made both."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return None


class Refuses(SAM):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError("call first_step and second_step")


class StepsTheBase(SAM):
    """For epochs without SAM, whose loop calls step()."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.base_optimizer.step(closure)


class Mixin:
    def step(self, closure: Any = None) -> None:
        return None


class MixedIn(Mixin, SAM):  # type: ignore[misc]
    pass


class Replaced(SAM):
    """In the object."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step = MethodType(lambda self, closure=None: None, self)  # type: ignore[method-assign]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("cls", [DoesNothing, Refuses, StepsTheBase, MixedIn, Replaced])
def test_the_two_calls_with_a_step_that_does_not_lead_to_sams(cls: type[SAM], base: Any) -> None:
    params, twin = make_params([5, 30], torch.float64), make_params([5, 30], torch.float64)
    optimizer = cls(params, base, lr=0.1, rho=0.5, momentum=0.9)
    plain = PlainSAM(twin, base, lr=0.1, rho=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(4):
        two_passes(optimizer, params, step)
        two_passes(plain, twin, step)
        assert not optimizer.perturbed
        scheduler.step()
        for group in plain.base.param_groups:
            group["lr"] *= 0.5
    assert furthest(params, twin) < CLOSE


def test_a_step_of_the_base_between_those_of_sam() -> None:
    params, twin = make_params([5, 30], torch.float64), make_params([5, 30], torch.float64)
    optimizer, plain = StepsTheBase(params, lr=0.1, momentum=0.9), PlainSAM(twin, torch.optim.SGD, lr=0.1, momentum=0.9)
    for step in range(6):
        if step % 3 == 0:
            two_passes(optimizer, params, step)
            two_passes(plain, twin, step)
            continue
        for these, its_step in ((params, optimizer.step), (twin, plain.base.step)):
            give_doubles(these, step)
            its_step()
    assert furthest(params, twin) < CLOSE


def logged(function: Any) -> Any:
    def inner(self: Any, *args: Any) -> Any:
        self.seen = [*getattr(self, "seen", ()), args]
        return function(self, *args)

    return inner


class Logged(SAM):
    @logged
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


class LoggedByName(SAM):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.seen = [*getattr(self, "seen", ()), closure]
        return SAM.step(self, closure)


@pytest.mark.parametrize("cls", [Logged, LoggedByName])
def test_a_step_that_leads_to_sams_is_called_once(cls: Any) -> None:
    params, twin = make_params([5, 30], torch.float64), make_params([5, 30], torch.float64)
    optimizer, plain = cls(params, lr=0.1), PlainSAM(twin, torch.optim.SGD, lr=0.1)
    for step in range(3):
        two_passes(optimizer, params, step)
        two_passes(plain, twin, step)
    assert furthest(params, twin) < CLOSE
    assert len(optimizer.seen) == 3


def test_a_step_that_somebody_has_put_into_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    step, seen = SAM.step, []

    def patched(self: SAM, *args: Any) -> Any:
        seen.append(args)
        return step(self, *args)

    monkeypatch.setattr(SAM, "step", patched)
    params = make_params([5])
    two_passes(SAM(params, lr=0.1), params, 0)
    assert len(seen) == 1


class OwnSecond(SAM):
    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old_p"]
        self.base_optimizer.step()


class OwnAscent(OwnSecond):
    """Its loop calls this instead of first_step."""

    @torch.no_grad()
    def ascend(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old_p"] = p.detach().clone()
            p.add_(0.1)


class Guarded(SAM):
    def second_step(self, zero_grad: bool = False) -> None:
        if any("old_p" in self.state[p] for p in self.param_groups[0]["params"]):
            raise AssertionError
        super().second_step(zero_grad)


def test_a_second_step_that_reads_what_the_inherited_first_step_does_not_write() -> None:
    with pytest.raises(TypeError, match=r"OwnSecond has a second_step .*super\(\)\.second_step"):
        OwnSecond(make_params([3]), lr=0.1)
    params = make_params([3])
    optimizer, w = OwnAscent(params, lr=0.0), params[0].detach().clone()
    optimizer.ascend()
    params[0].grad = torch.ones(3)
    optimizer.second_step()
    assert torch.equal(params[0], w)
    two_passes(Guarded(params, lr=0.1), params, 0)
