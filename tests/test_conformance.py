"""SAM passes the tests that torch has for its own optimizers.

Wherever it can be, the oracle is torch's own optimizer on the same calls.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import give, make_params, same_bits, same_step, values
from torch import Tensor, nn
from torch_conformance import REFUSED, bases, optimizer_infos, plain_step, sam_step

from sam_fast import SAM

each_optimizer = pytest.mark.parametrize("index", range(12), ids=lambda i: f"info{i}")


@pytest.fixture
def info(index: int) -> Any:
    return optimizer_infos()[index]


@pytest.mark.guarantee(id="every-optimizer")
def test_every_optimizer_of_torch_is_covered() -> None:
    """A new optimizer in torch must be tested, or refused with a reason."""
    known = {
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    } - {"Optimizer"}
    assert {info.name for info in optimizer_infos()} == known - set(REFUSED)
    assert len(optimizer_infos()) == 12


def two_dimensional(seed: int = 0) -> list[nn.Parameter]:
    """Muon takes matrices only."""
    flat = make_params([12, 35, 1], seed=seed, grads=False)
    return [nn.Parameter(p.detach().reshape(shape)) for p, shape in zip(flat, [(3, 4), (5, 7), (1, 1)], strict=True)]


# ---- Constructor -----------------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="torch-errors")
@each_optimizer
def test_constructor_errors_are_torchs(info: Any) -> None:
    for case in info.optim_error_inputs_func("cpu", torch.float32):
        entry = case.optimizer_error_input
        params = two_dimensional() if entry.params is None else entry.params
        words = "params must be an iterable" if isinstance(params, Tensor) else case.error_regex
        if issubclass(case.error_type, Warning):
            with pytest.warns(case.error_type, match=words):
                SAM(params, info.optim_cls, **entry.kwargs)
        elif case.error_on.name == "STEP_ERROR":
            optimizer, before = SAM(params, info.optim_cls, **entry.kwargs), values(params)
            optimizer.first_step()
            with pytest.raises(case.error_type, match=words):
                optimizer.second_step()
            assert same_bits(params, before)
        else:
            with pytest.raises(case.error_type, match=words):
                SAM(params, info.optim_cls, **entry.kwargs)


def leaf() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


@pytest.mark.guarantee(id="torch-errors")
@bases
@pytest.mark.parametrize(
    "entry",
    [
        lambda: {"params": {leaf()}},
        lambda: {"params": [leaf() * 2]},
        lambda: {"params": [torch.ones(3).numpy()]},
        lambda: {"params": ["weight"]},
        lambda: {"params": [("weight", leaf()), leaf()]},
        lambda: [leaf()],
        dict,
    ],
    ids=["set", "not a leaf", "array", "string", "half named", "no dict", "no params"],
)
def test_a_group_that_torch_refuses_is_refused_alike(
    base: type[torch.optim.Optimizer], entry: Callable[[], Any]
) -> None:
    plain, optimizer = base([leaf()], lr=0.1), SAM([leaf()], base, lr=0.1)
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises
        plain.add_param_group(entry())
    with pytest.raises(expected.type, match=re.escape(str(expected.value)[:40])):
        optimizer.add_param_group(entry())
    assert len(optimizer.param_groups) == 1
    sam_step(optimizer, optimizer.param_groups[0]["params"], 0)
    if isinstance(entry(), dict) and entry():
        with pytest.raises(expected.type):
            SAM([entry()], base, lr=0.1)


# ---- Every optimizer with every option -------------------------------------------------------------------------------


@pytest.mark.guarantee(id="every-optimizer")
@each_optimizer
def test_every_option_steps_as_torchs_own(info: Any, flatten: bool) -> None:
    """Learning rates in tensors, weight decay, maximize, momentum...: restored weights and the second gradient give the
    base optimizer's own step.
    """
    for case in info.optim_inputs_func("cpu"):
        params, own = two_dimensional(), two_dimensional()
        optimizer, plain = (
            SAM(params, info.optim_cls, flatten=flatten, **case.kwargs),
            info.optim_cls(own, **case.kwargs),
        )
        for seed in range(3):
            sam_step(optimizer, params, seed)
            plain_step(plain, own, seed)
        assert same_step(info.optim_cls, params, own), case.desc


@pytest.mark.guarantee(id="state-dict")
@each_optimizer
def test_a_state_dict_determines_what_follows(info: Any, flatten: bool) -> None:
    """Saved with weights_only=True, loaded into a new optimizer: the same state dict, and the same bits from there
    on.
    """
    for case in info.optim_inputs_func("cpu")[-2:]:
        params = two_dimensional()
        optimizer = SAM(params, info.optim_cls, flatten=flatten, **case.kwargs)
        for seed in range(2):
            sam_step(optimizer, params, seed)
        first, second = (io.BytesIO() for _ in range(2))
        torch.save(optimizer.state_dict(), first)
        torch.save(optimizer.state_dict(), second)
        assert first.getvalue() == second.getvalue()
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        twin = SAM(twins, info.optim_cls, flatten=flatten, **case.kwargs)
        first.seek(0)
        twin.load_state_dict(torch.load(first, weights_only=True))
        assert pickle.dumps(str(twin.state_dict())) == pickle.dumps(str(optimizer.state_dict()))
        for seed in range(2, 4):
            sam_step(optimizer, params, seed)
            sam_step(twin, twins, seed)
        assert same_bits(params, twins), case.desc


@pytest.mark.guarantee(id="older-state-dicts")
@each_optimizer
def test_an_older_state_dict_loads(info: Any) -> None:
    """One from before the optimizer had some of its options, and before it was SAM's: they take the constructor's
    values.
    """
    params = two_dimensional()
    optimizer = SAM(params, info.optim_cls)
    sam_step(optimizer, params, 0)
    state = copy.deepcopy(optimizer.state_dict())
    newer = {*info.not_og_supported_flags, "rho", "adaptive", "eta", "perturb"}
    for group in state["param_groups"]:
        for name in newer & set(group):
            del group[name]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = SAM(twins, info.optim_cls)
    twin.load_state_dict(state)
    sam_step(optimizer, params, 1)
    sam_step(twin, twins, 1)
    assert same_bits(params, twins)


@pytest.mark.guarantee(id="older-state-dicts")
@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW])
def test_step_counters_that_are_numbers_load(base: type[torch.optim.Optimizer]) -> None:
    """As state dicts of PyTorch before 1.12 have them.

    The fused second step takes what the base optimizer makes of them.
    """
    params = two_dimensional()
    optimizer = SAM(params, base, lr=0.01)
    sam_step(optimizer, params, 0)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = entry["step"].item()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = SAM(twins, base, lr=0.01)
    twin.load_state_dict(state)
    sam_step(optimizer, params, 1)
    sam_step(twin, twins, 1)
    assert same_bits(params, twins)


@pytest.mark.guarantee(id="zero-gradients")
@each_optimizer
def test_zero_gradients_move_what_torch_moves(info: Any, flatten: bool) -> None:
    """Nothing, unless the base optimizer itself does (weight decay, momentum)."""
    params, own = two_dimensional(), two_dimensional()
    options = {} if info.name == "Rprop" else {"weight_decay": 0}
    optimizer, plain = SAM(params, info.optim_cls, flatten=flatten, **options), info.optim_cls(own, **options)
    before = values(params)
    for p in [*params, *own]:
        p.grad = torch.zeros_like(p)
    optimizer.first_step()
    assert same_bits(params, before)
    optimizer.second_step()
    plain.step()
    assert same_bits(params, own)
    if info.name not in ("ASGD", "Rprop"):
        assert same_bits(params, before)


@each_optimizer
def test_without_gradients_nothing_happens(info: Any) -> None:
    params = two_dimensional()
    optimizer = SAM(params, info.optim_cls)
    before = values(params)
    optimizer.first_step()
    optimizer.second_step()
    assert same_bits(params, before)
    assert float(optimizer.grad_norm) == 0.0


@each_optimizer
def test_gradients_that_are_none_at_some_steps(info: Any) -> None:
    params, own = two_dimensional(), two_dimensional()
    optimizer, plain = SAM(params, info.optim_cls), info.optim_cls(own)
    for step in range(5):
        give(params, 100 + step)
        params[step % 3].grad = None  # in the first pass, another one in the second
        optimizer.first_step()
        give(params, step)
        give(own, step)
        params[(step + 1) % 3].grad = own[(step + 1) % 3].grad = None
        optimizer.second_step()
        plain.step()
    assert same_step(info.optim_cls, params, own)


@pytest.mark.guarantee(id="hooks")
def test_schedulers_of_torch_give_the_same_learning_rates() -> None:
    for info in optimizer_infos():
        for makers in info.scheduler_inputs:
            params, own = two_dimensional(), two_dimensional()
            optimizer, plain = SAM(params, info.optim_cls, lr=0.1), info.optim_cls(own, lr=0.1)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", message=".*epoch parameter.*")
                schedulers, expected = [make(optimizer) for make in makers], [make(plain) for make in makers]
                for step in range(12):
                    sam_step(optimizer, params, step)
                    plain_step(plain, own, step)
                    for scheduler in (*schedulers, *expected):
                        scheduler.step(
                            *[1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []
                        )
                    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
            assert same_step(info.optim_cls, params, own), info.name


# ---- Printing --------------------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="copies")
@bases
def test_repr_has_every_line_of_the_base_optimizers(base: type[torch.optim.Optimizer]) -> None:
    lines = set(
        repr(SAM([{"params": make_params([3])}, {"params": make_params([2]), "lr": 0.5}], base, lr=0.1)).splitlines()
    )
    own = repr(base([{"params": make_params([3])}, {"params": make_params([2]), "lr": 0.5}], lr=0.1)).splitlines()
    assert set(own[1:]) <= lines
