"""optimizer.second_pass and the BatchNorm statistics: correct however the second pass ends."""

from __future__ import annotations

import pytest
import torch
from cases import same_bits
from norms import batch, forward_only, statistics, unchanged
from torch import nn

from sam_fast import SAM, disable_running_stats, enable_running_stats

pytestmark = pytest.mark.usefixtures("forced_backend")


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5))


class Interrupted(Exception):
    """Raised in the middle of something."""


def perturbed(model: nn.Module, flatten: bool) -> tuple[SAM, list[torch.Tensor]]:
    """A SAM optimizer after its first step, and the weights as they were before it."""
    optimizer = SAM(model.parameters(), lr=0.1, flatten=flatten)
    model(batch(1)).square().sum().backward()
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.first_step(zero_grad=True)
    return optimizer, weights


def test_second_pass_does_not_count(model: nn.Module, flatten: bool) -> None:
    optimizer, _ = perturbed(model, flatten)
    before = statistics(model)
    with optimizer.second_pass(model):
        model(batch(1)).square().sum().backward()
        assert not unchanged(model, before)
    optimizer.second_step()
    assert unchanged(model, before)


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_second_pass_that_raises_puts_statistics_and_weights_back(
    model: nn.Module, flatten: bool, error: type[BaseException]
) -> None:
    optimizer, weights = perturbed(model, flatten)
    before = statistics(model)

    def body() -> None:
        with optimizer.second_pass(model):
            model(batch(1))
            raise error

    with pytest.raises(error):
        body()
    assert unchanged(model, before)
    assert same_bits(list(model.parameters()), weights)
    assert not optimizer.perturbed


def test_second_pass_without_first_step_is_an_error_and_changes_nothing(model: nn.Module) -> None:
    optimizer, before = SAM(model.parameters(), lr=0.1), statistics(model)
    with pytest.raises(RuntimeError, match="first_step"), optimizer.second_pass(model):
        model(batch(1))
    assert unchanged(model, before)


def test_second_pass_and_the_two_calls_may_be_mixed(model: nn.Module) -> None:
    """Both ways at once: code that was ported halfway."""
    optimizer, _ = perturbed(model, flatten=False)
    before = statistics(model)
    disable_running_stats(model)
    with optimizer.second_pass(model):
        model(batch(1)).square().sum().backward()
    enable_running_stats(model)
    optimizer.second_step()
    assert unchanged(model, before)


def test_after_a_second_pass_that_raised_training_goes_on_right(model: nn.Module) -> None:
    """Skip the batch, zero the gradients, go on: the next first pass counts, its second does not."""
    optimizer, _ = perturbed(model, flatten=False)

    def failing() -> None:
        with optimizer.second_pass(model):
            model(torch.randn(8, 40))

    with pytest.raises(RuntimeError, match="mat1"):
        failing()
    optimizer.zero_grad()
    expected = forward_only(model, batch(2))
    model(batch(2)).square().sum().backward()
    optimizer.first_step(zero_grad=True)
    with optimizer.second_pass(model):
        model(batch(2)).square().sum().backward()
    optimizer.second_step()
    assert unchanged(model, expected)


def test_second_pass_takes_a_part_of_the_model(model: nn.Sequential) -> None:
    """The statistics of the module that is named, of no other."""
    optimizer, _ = perturbed(model, flatten=False)
    expected = forward_only(model, batch(1))
    before = statistics(model)
    with optimizer.second_pass(model[1]):
        model(batch(1)).square().sum().backward()
    assert unchanged(model[1], before[:3])
    assert unchanged(model[3], expected[3:])


def test_second_pass_may_be_entered_once_per_micro_batch(model: nn.Module, flatten: bool) -> None:
    optimizer, _ = perturbed(model, flatten)
    before = statistics(model)
    for seed in (1, 2, 3):
        with optimizer.second_pass(model):
            model(batch(seed)).square().sum().backward()
        assert optimizer.perturbed
    optimizer.second_step()
    assert unchanged(model, before)
