"""Where a loop calls ``GradScaler.unscale_``: after the second backward pass, if at all."""

from __future__ import annotations

import pytest
import torch
from cases import make_params, same_bits
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
