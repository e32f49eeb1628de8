"""Base optimizers of every origin, and what they have of their own."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from cases import give_doubles, make_params, two_passes, values, wrap
from plain_sam import PlainSAM, furthest
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from sam_fast import SAM

CLOSE = 1e-12


# ---- What the base optimizer has of its own --------------------------------------------------------------------------


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers are: eval() exchanges the weights, train() puts them back."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.mode, self.alpha = "train", 0.25

    def _switch(self, mode: str, sign: float) -> None:
        if self.mode != mode:
            self.mode = mode
            for group in self.param_groups:
                torch._foreach_add_([p.data for p in group["params"]], sign)

    def eval(self) -> None:
        self._switch("eval", 1.0)

    def train(self) -> None:
        self._switch("train", -1.0)


@pytest.mark.guarantee(id="train-eval")
def test_train_and_eval_reach_the_base_optimizer_between_steps():
    params = make_params([4])
    before = values(params)
    optimizer = SAM(params, Averaging, lr=0.1)
    for each in (optimizer, wrap(optimizer)):
        each.eval()
        assert optimizer.base_optimizer.mode == "eval"
        assert furthest(params, [w + 1 for w in before]) == 0.0
        each.train()
        assert each.mode == "train"
        assert each.alpha == 0.25
    optimizer.first_step()
    for switch in (optimizer.eval, optimizer.train):
        with pytest.raises(RuntimeError, match=r"restore\(\)"):
            switch()
    optimizer.restore()


def test_a_base_optimizer_without_train_has_none():
    optimizer = SAM(make_params([4]), lr=0.1)
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "_private_to_nobody")
    assert not hasattr(optimizer, "found_inf")
    with pytest.raises(AttributeError, match=r"'SAM'.*'nonsense'.*SGD"):
        _ = optimizer.nonsense


# ---- Where the base optimizer comes from -----------------------------------------------------------------------------


@pytest.mark.guarantee(id="base-optimizer")
@pytest.mark.parametrize(
    "base", ["torch.optim.SGD", "torch.optim.sgd.SGD", functools.partial(torch.optim.SGD, momentum=0.9)]
)
def test_a_base_optimizer_by_name_or_partial(base):
    params, twin = make_params([5], torch.float64), make_params([5], torch.float64)
    optimizer = SAM(params, base, lr=0.1)
    plain = PlainSAM(twin, functools.partial(torch.optim.SGD, momentum=0.0 if isinstance(base, str) else 0.9), lr=0.1)
    for step in range(3):
        two_passes(optimizer, params, step)
        two_passes(plain, twin, step)
    assert furthest(params, twin) < CLOSE


@pytest.mark.guarantee(id="base-optimizer")
def test_an_optimizer_that_is_there_already():
    """In mid-training, with a scheduler on it: one state, one list of groups."""
    params, twin = make_params([5, 8], torch.float64), make_params([5, 8], torch.float64)
    mine, its = (
        torch.optim.SGD([{"params": own[:1], "lr": 0.1}, {"params": own[1:]}], lr=0.2, momentum=0.9)
        for own in (params, twin)
    )
    schedulers = [lr_scheduler.ExponentialLR(o, 0.5) for o in (mine, its)]
    for own, o in ((params, mine), (twin, its)):
        give_doubles(own, 50)
        o.step()
    optimizer = SAM(mine, rho=0.5)
    assert optimizer.base_optimizer is mine
    assert optimizer.state is mine.state
    assert optimizer.param_groups is mine.param_groups
    plain = PlainSAM(twin, lambda *_, **__: its, rho=0.5)
    for step in range(4):
        two_passes(optimizer, params, step)
        assert optimizer.second_step_path == "fused"
        two_passes(plain, twin, step)
        for scheduler in schedulers:
            scheduler.step()
    assert furthest(params, twin) < CLOSE


@pytest.mark.parametrize("base", [torch.optim.Adadelta, SAM])
def test_an_optimizer_whose_options_collide_is_refused_and_left_as_it_was(base):
    existing = base(make_params([3]), lr=0.1)
    groups = copy.deepcopy(existing.param_groups)
    with pytest.raises(ValueError, match="rho"):
        SAM(existing)
    assert [group.keys() for group in existing.param_groups] == [group.keys() for group in groups]


def decay_groups(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    """Makes its own groups, as timm does, with and without weight decay."""
    params = [p for group in groups for p in group["params"]]
    own = [
        {"params": [p for p in params if (p.ndim > 1) == many], "weight_decay": 0.1 * many} for many in (True, False)
    ]
    return torch.optim.AdamW(own, **options)


@pytest.mark.guarantee(id="base-optimizer")
def test_groups_of_the_base_optimizers_own_take_sams_options():
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]
    optimizer = SAM(params, decay_groups, lr=0.1, rho=0.3, adaptive=True)
    assert [(group["rho"], group["adaptive"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.3, True, 0.1),
        (0.3, True, 0.0),
    ]
    two_passes(optimizer, params, 1)
    assert optimizer.second_step_path == "fused"
    kept = SAM([{"params": params, "rho": 0.7}], decay_groups, lr=0.1)
    assert [group["rho"] for group in kept.param_groups] == [0.7, 0.7]
    mixed = [{"params": [nn.Parameter(torch.ones(3))], "rho": rho} for rho in (0.1, 0.2)]
    with pytest.raises(ValueError, match=r"group 1.*rho"):
        SAM(mixed, decay_groups, lr=0.1)


def test_groups_that_an_instance_got_later_or_loaded_take_the_options():
    params, more = make_params([4]), make_params([3])
    mine = torch.optim.SGD(params, lr=0.1)
    plain = copy.deepcopy(mine.state_dict())
    optimizer = SAM(mine, rho=0.3)
    mine.add_param_group({"params": more, "perturb": False})
    two_passes(optimizer, [*params, *more], 1)
    assert [(group["rho"], group["perturb"]) for group in optimizer.param_groups] == [(0.3, True), (0.3, False)]
    mine.add_param_group({"params": make_params([5])})
    two_passes(optimizer, [*params, *more], 2)
    assert [group["perturb"] for group in optimizer.param_groups] == [True, False, True]
    only = SAM(torch.optim.SGD(make_params([4]), lr=0.1), rho=0.3)
    only.base_optimizer.load_state_dict(plain)
    two_passes(only, only.param_groups[0]["params"], 1)
    assert only.param_groups[0]["rho"] == 0.3


def test_a_bad_option_leaves_an_instance_as_it_was():
    mine = torch.optim.SGD(make_params([4]), lr=0.1)
    with pytest.raises(ValueError, match="rho"):
        SAM(mine, rho=-1.0)
    assert "rho" not in mine.param_groups[0]
    SAM(mine, rho=0.2)


class TakesNothing(torch.optim.SGD):
    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def test_a_zero_grad_that_takes_nothing():
    params = make_params([3])
    SAM(params, TakesNothing, lr=0.1).zero_grad()
    assert params[0].grad is None


class MakesStateEarly(torch.optim.RMSprop):
    """Makes a parameter's state when it is given, not in its step."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p] = {"step": torch.tensor(0.0), "square_avg": torch.full_like(p, 2.0)}


class FindsItsRate(torch.optim.Optimizer):
    """Has no learning rate, as Adafactor with relative_step=True."""

    def __init__(self, params: Any, lr: float | None = None) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)


@pytest.mark.guarantee(id="misuse")
def test_a_step_without_first_step_says_so_whatever_the_learning_rate_is():
    params = make_params([4])
    optimizer = SAM(params, FindsItsRate)
    give_doubles(params, 1)
    with pytest.raises(RuntimeError, match="needs first_step"):
        optimizer.step()


class Strict(torch.optim.SGD):
    """Takes no entries in groups that it does not know, as MuonWithAuxAdam."""

    def __init__(self, groups: Any, lr: float) -> None:
        assert all(group.keys() <= {"params", "lr", "use_muon"} for group in groups)
        super().__init__([{**group, "params": group["params"][::-1]} for group in groups], lr=lr)


@pytest.mark.guarantee(id="base-optimizer")
def test_a_base_optimizer_need_not_take_sams_options():
    params, twin = make_params([5, 9, 3], torch.float64), make_params([5, 9, 3], torch.float64)

    def groups(params: Any) -> list[dict[str, Any]]:
        return [
            {"params": params[:2], "use_muon": True, "rho": 0.5},
            {"params": params[2:], "use_muon": False, "perturb": False, "lr": 0.01},
            {"params": [], "use_muon": False, "rho": 0.3},
        ]

    optimizer, other = SAM(groups(params), Strict, rho=0.1, lr=0.1), SAM(groups(twin), torch.optim.SGD, rho=0.1, lr=0.1)
    for name in ("rho", "perturb", "lr"):
        assert [group[name] for group in optimizer.param_groups] == [group[name] for group in other.param_groups]
    for step in range(3):
        two_passes(optimizer, params, step)
        two_passes(other, twin, step)
    assert furthest(params, twin) < 1e-12


# ---- State as somebody's own optimizer keeps it ----------------------------------------------------------------------

NAME = "buffer_of_mine"


class KeepsATensor(torch.optim.Optimizer):
    """The state of a parameter is its buffer, not a dictionary."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def buffer(self, p: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.state.setdefault(p, torch.zeros_like(p))
        return found

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.buffer(p).mul_(0.9).add_(p.grad), alpha=group["lr"])

    def warm_up(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.buffer(p).add_(1.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads into the state that it has."""
        params = [p for group in self.param_groups for p in group["params"]]
        self.state.update({params[index]: copy.deepcopy(entry) for index, entry in state_dict["state"].items()})


class NamesInATuple(KeepsATensor):
    def buffer(self, p: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        if not state:
            state.update({name: torch.zeros_like(p) for name in ("fast", "slow")})
        found: torch.Tensor = next(iter(state.values()))
        return found


class GlobalName(KeepsATensor):
    def buffer(self, p: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        if not state:
            state[NAME] = torch.zeros_like(p)
        found: torch.Tensor = state[NAME]
        return found


class NamesMadeUp(KeepsATensor):
    def buffer(self, p: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.state[p].setdefault(f"buffer_{p.ndim}", torch.zeros_like(p))
        return found


@pytest.mark.guarantee(id="others-state")
@pytest.mark.parametrize(
    ("base", "when"),
    [
        (base, when)
        for base in (KeepsATensor, NamesInATuple, GlobalName, NamesMadeUp)
        for when in ("in its step", "loaded", "before its first step")
        # Nothing tells that an entry with a made-up name is the base optimizer's before it has stepped.
        if base is not NamesMadeUp or when != "before its first step"
    ],
)
def test_the_state_of_an_optimizer_of_somebodys_own_is_its_own(base, when):
    params, twin = make_params([5, 9], torch.float64), make_params([5, 9], torch.float64)
    optimizer, plain = SAM(params, base, lr=0.01), PlainSAM(twin, base, lr=0.01)
    if when == "before its first step":
        optimizer.warm_up(), plain.base.warm_up()
    for step in range(6):
        if step == 3 and when == "loaded":
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = SAM(params, base, lr=0.01)
            optimizer.load_state_dict(saved)
        two_passes(optimizer, params, step)
        two_passes(plain, twin, step)
    assert furthest(params, twin) < CLOSE


class KeepsATensorEarly(KeepsATensor):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.buffer(p)


@pytest.mark.parametrize("base", [MakesStateEarly, KeepsATensorEarly])
def test_state_that_the_base_optimizer_makes_of_a_new_group_is_its_own(base: Any):
    params, twin = make_params([5, 9], torch.float64), make_params([5, 9], torch.float64)
    optimizer, plain = SAM(params[:1], base, lr=0.01), PlainSAM(twin[:1], base, lr=0.01)
    optimizer.add_param_group({"params": params[1:]})
    plain.base.add_param_group({"params": twin[1:]})
    for step in range(3):
        two_passes(optimizer, params, step)
        two_passes(plain, twin, step)
    assert furthest(params, twin) < CLOSE
