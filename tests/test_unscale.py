"""Where a loop calls ``GradScaler.unscale_``: after the second backward pass, if at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import make_params, same_bits
from plain_sam import furthest
from scaled_runs import BASES, Run, batch_of, scaler_with
from torch import nn

from sam_fast import SAM


@pytest.mark.guarantee(id="grad-scaler")
def test_unscale_before_first_step_and_again_is_refused_by_torch() -> None:
    run = Run(BASES["sgd"], scaler_with(), clip=True)
    run.backward(*batch_of(0), None)
    run.scaler.unscale_(run.optimizer)
    run.optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="already been called"):
        run.scaler.unscale_(run.optimizer)


def test_unscale_before_first_step_and_not_again_is_an_error(flatten: bool) -> None:
    """The step was made with gradients times the scale. With unscale_ where it belongs, nothing is said."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    optimizer = SAM(model.parameters(), rho=0.1, flatten=flatten, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for right in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model(x).square().sum()).backward()
        if not right:
            scaler.unscale_(optimizer)
        optimizer.first_step(zero_grad=True)
        scaler.scale(model(x).square().sum()).backward()
        if right:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            assert not same_bits(list(model.parameters()), before)
        else:
            with pytest.raises(RuntimeError, match=r"unscale_\(optimizer\) was called before first_step"):
                scaler.step(optimizer)
            optimizer.restore()
            assert same_bits(list(model.parameters()), before)
        scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize("scale", [2.0**-9, 2.0])
def test_a_second_gradient_that_is_large_for_a_small_scale_is_no_error(scale: float) -> None:
    """As in a run that resumes with a scale that has come down; or where the gradients are those of other groups."""
    moved, still = make_params([3, 3], grads=False)
    optimizer, scaler = SAM([{"params": [moved]}, {"params": [still], "perturb": False}], lr=0.1), scaler_with(scale)
    for call in (optimizer.first_step, lambda: scaler.unscale_(optimizer)):
        optimizer.zero_grad()
        scaler.scale(moved.sum() + 1e3 * still.sum()).backward()
        call()
    scaler.step(optimizer)
    assert not optimizer.perturbed


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_sparse_gradients_of_a_group_that_is_not_perturbed_are_unscaled(base: Any, scale: float) -> None:
    """By the scaler's step, as without SAM: nobody calls unscale_."""
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2))
    model.load_state_dict({name: torch.arange(w.numel()).view_as(w) / 40 for name, w in model.state_dict().items()})
    twin = copy.deepcopy(model)
    groups = [{"params": model[1].parameters()}, {"params": model[0].parameters(), "perturb": False}]
    optimizer, plain, scaler = SAM(groups, base, rho=0.0, lr=0.1), base(twin.parameters(), lr=0.1), scaler_with(scale)
    for call in (optimizer.first_step, lambda: scaler.step(optimizer)):
        optimizer.zero_grad()
        scaler.scale(model(torch.tensor([1, 2, 2])).square().mean()).backward()
        call()
    twin(torch.tensor([1, 2, 2])).square().mean().backward()
    plain.step()
    assert furthest(model.parameters(), twin.parameters()) == 0.0
