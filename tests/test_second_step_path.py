"""Which second steps are fused, and what becomes of those that are not: ``optimizer.second_step_path``."""

from __future__ import annotations

import functools
import types
from typing import Any
from unittest import mock

import pytest
import torch
from cases import give, make_params, same_bits, values
from fused_runs import run, without
from torch import nn

from sam_fast import SAM


class MySgd(torch.optim.SGD):
    pass


def refused(kind: str) -> tuple[SAM, list[nn.Parameter]]:
    """An optimizer whose second step must not be fused, after a first step that made its state."""
    params = make_params([100, 7])
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    base = {"subclass": MySgd, "rmsprop": torch.optim.RMSprop}.get(kind, torch.optim.SGD)
    optimizer = SAM(params, base, **options)
    optimizer.first_step()
    optimizer.second_step()
    if kind == "pre hook":
        optimizer.base_optimizer.register_step_pre_hook(lambda *_: None)
    elif kind == "post hook":
        optimizer.base_optimizer.register_step_post_hook(lambda *_: None)
    elif kind == "replaced step":
        optimizer.base_optimizer.step = optimizer.base_optimizer.step
    elif kind == "replaced step under a scheduler":
        optimizer.base_optimizer.step = types.MethodType(lambda self: type(self).step(self), optimizer.base_optimizer)
        torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer, 100)
    elif kind == "lr with gradient":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    elif kind == "state layout":
        optimizer.state[params[0]]["momentum_buffer"] = torch.zeros(200)[::2]
    elif kind == "state dtype":
        optimizer.state[params[0]]["momentum_buffer"] = torch.zeros(100, dtype=torch.float64)
    elif kind == "no state":
        optimizer.state.pop(params[1])
    return optimizer, params


KINDS = ["subclass", "rmsprop", "pre hook", "post hook", "lr with gradient"]
KINDS += ["replaced step", "replaced step under a scheduler"]


@pytest.mark.parametrize("kind", [*KINDS, "state layout", "state dtype", "no state"])
def test_what_the_kernels_do_not_do_is_the_base_optimizers_step(kind, was_fused):
    optimizer, params = refused(kind)
    twin_optimizer, twin = refused(kind)
    was_fused.clear()
    optimizer.first_step()
    optimizer.second_step()
    assert was_fused == [kind == "no state"]  # which the kernel makes, with the same bits
    assert (optimizer.second_step_path == "fused") == was_fused[0]
    twin_optimizer.first_step()
    twin_optimizer.restore()
    with torch.no_grad() if kind != "lr with gradient" else torch.enable_grad():
        twin_optimizer.base_optimizer.step()
    assert same_bits(values(params), values(twin))


@pytest.mark.parametrize("wraps", [True, False], ids=["wraps", "bare"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_was_patched_in_its_class_is_called(base, wraps, monkeypatch):
    """AdamW's is Adam's. PyTorch wraps the patch once more when it makes the next optimizer of the class."""
    params, original = make_params([100, 7]), base.step
    before = SAM(params, base, lr=0.1)
    calls = mock.Mock()

    def patched(self: Any, closure: Any = None) -> Any:
        calls()
        return original(self, closure)

    monkeypatch.setattr(base, "step", functools.wraps(original)(patched) if wraps else patched)
    for count, optimizer in enumerate([before, SAM(params, base, lr=0.1)], start=1):
        give(params, count, 0.01)
        optimizer.first_step()
        optimizer.second_step()
        assert calls.call_count == count
        assert optimizer.second_step_path == f"{base.__name__}.step was replaced"
    monkeypatch.undo()
    give(params, 3, 0.01)
    before.first_step()
    before.second_step()
    assert before.second_step_path == "fused"


def test_parameters_that_moved_between_the_passes(was_fused):
    """Given other memory between the passes: restored and stepped there, by PyTorch."""
    params = make_params([100, 7])
    before = values(params)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1)
    optimizer.first_step()
    params[0].data = params[0].data.double()
    params[0].grad = torch.ones(100, dtype=torch.float64)
    optimizer.second_step()
    assert was_fused == [False]
    assert torch.allclose(params[0], before[0].double() - 0.1, rtol=0, atol=1e-12)


def test_flattened_parameters_that_moved_take_the_base_optimizers_step(was_fused):
    params = make_params([100, 7])
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, flatten=True)
    for _ in range(2):
        give(params, 1, 0.01)
        optimizer.first_step()
        optimizer.second_step()
    before = values(params)
    give(params, 2, 0.01)
    optimizer.first_step()
    params[0].data = params[0].data.clone()
    give(params, 3, 0.01)
    optimizer.restore()
    assert same_bits(values(params), before)
    optimizer.first_step()
    params[1].data = params[1].data.clone()
    optimizer.second_step()
    assert was_fused[-1] is False
    assert not optimizer.perturbed


@pytest.mark.not_interpreted
def test_one_odd_parameter_does_not_cost_the_others_their_kernel(was_fused):
    """A parameter with gaps in memory goes through the torch backend, in the same step."""
    results = []
    for fused in (True, False):
        odd = nn.Parameter(torch.linspace(-1, 1, 60).reshape(6, 10)[:, ::2])
        params = [*make_params([100, 4003]), odd]
        optimizer = SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9)
        if not fused:
            without(optimizer)
        run(optimizer, params, 3)
        results.append(values(params))
    assert was_fused == [True, True, True, False, False, False]
    assert same_bits(*results)


@pytest.mark.parametrize(
    "base", [functools.partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW, torch.optim.RMSprop]
)
@pytest.mark.parametrize("flatten", [False, True])
def test_a_parameter_that_is_listed_twice_takes_the_base_optimizers_step(base, flatten):
    """PyTorch steps it twice. The fused step did once."""
    (p,), (twin,) = make_params([7]), make_params([7])
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer, plain = SAM([p, p], base, rho=0.0, flatten=flatten, lr=0.1), base([twin, twin], lr=0.1)
    for seed in range(2):
        for each in (p, twin):
            give([each], seed)
        optimizer.first_step()
        optimizer.second_step()
        plain.step()
        assert same_bits([p], [twin])
    assert optimizer.second_step_path != "fused"


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_group_that_was_refused_does_not_cost_the_others_their_kernel():
    params = make_params([7])
    optimizer = SAM(params, backend="torch", flatten=True)
    (twice,), tied = make_params([3]), make_params([4])
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": [twice, twice, *tied, nn.Parameter(tied[0].detach()[:2])]})
    run(optimizer, params, 1)
    assert optimizer.second_step_path == "fused"


@pytest.mark.parametrize("name", ["step", "zero_grad"])
def test_a_method_that_somebody_has_put_on_the_optimizer_is_called(name):
    """A scheduler's wrapping hides it from nobody."""
    optimizer = SAM(make_params([7]), lr=0.1)
    calls = mock.Mock()

    def patched(self: Any) -> None:
        calls()
        getattr(type(self), name)(self)

    owner: Any = optimizer if name == "step" else optimizer.base_optimizer
    setattr(owner, name, types.MethodType(patched, owner))
    torch.optim.lr_scheduler.StepLR(optimizer, 100)
    optimizer.first_step()
    optimizer.second_step(zero_grad=True)
    assert calls.call_count == 1


def test_zero_grad_is_pytorchs_where_somebody_looks(monkeypatch: pytest.MonkeyPatch):
    optimizer = SAM(make_params([7]), lr=0.1)
    with torch.profiler.profile() as profile:
        optimizer.zero_grad()
    assert "Optimizer.zero_grad#SGD.zero_grad" in {event.key for event in profile.key_averages()}
    calls = mock.Mock()
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self: calls())
    optimizer.zero_grad()
    assert calls.call_count == 1
