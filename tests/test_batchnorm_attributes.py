"""Statistics that are plain attributes, and modules that a model keeps in lists and the like: to PyTorch they are no
part of it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import same_bits
from norms import batch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sam_fast import SAM, TrainStep, disable_running_stats, enable_running_stats, frozen_running_stats

pytestmark = pytest.mark.usefixtures("forced_backend")


class HandWrittenNorm(nn.Module):
    """As textbooks have it: no buffers."""

    def __init__(self, update: str) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.update = update
        self.moving_mean = None if update == "made" else torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0)
        if self.training:
            if self.moving_mean is None:
                self.moving_mean = mean.detach().clone()
            elif self.update == "in-place":
                self.moving_mean.lerp_(mean.detach(), 0.1)
            else:
                self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
        return (x - mean) * self.gain


class KeepsAside(nn.Module):
    """A model with a norm that it hides from PyTorch, so that state dicts leave it out."""

    def __init__(self, keep: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.linear, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        kept = keep(norm)
        if kept is norm:
            object.__setattr__(self, "kept", norm)
        else:
            self.kept = kept
        self.norm = weakref.ref(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm()(self.linear(x))


def backward(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).exp().mean()
    loss.backward()
    return loss


def second_pass(model: nn.Module, optimizer: SAM, x: Tensor) -> None:
    backward(model, x)
    optimizer.first_step(zero_grad=True)
    with optimizer.second_pass(model):
        backward(model, x)
    optimizer.second_step(zero_grad=True)


def two_calls(model: nn.Module, optimizer: SAM, x: Tensor) -> None:
    enable_running_stats(model)
    backward(model, x)
    optimizer.first_step(zero_grad=True)
    disable_running_stats(model)
    backward(model, x)
    optimizer.second_step(zero_grad=True)


def closure(model: nn.Module, optimizer: SAM, x: Tensor) -> None:
    optimizer.step(lambda: backward(model, x), passes="both")
    optimizer.zero_grad()


def train_step(model: nn.Module, optimizer: SAM, x: Tensor) -> None:
    TrainStep(model, optimizer, lambda model, x: model(x).exp().mean())(x)


every_style = pytest.mark.parametrize("style", [second_pass, two_calls, closure, train_step])


@pytest.mark.guarantee(id="statistics-attributes")
@every_style
@pytest.mark.parametrize("update", ["in-place", "reassigned", "made"])
def test_statistics_that_are_plain_attributes(style: Any, update: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), HandWrittenNorm(update))
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)
    twin = copy.deepcopy(model[1])
    for seed in range(3):
        x = batch(seed)
        twin(model[0](x).detach())
        style(model, optimizer, x)
        assert same_bits([model[1].moving_mean], [twin.moving_mean])


ASIDE = {
    "list": lambda norm: [None, norm],
    "tuple": lambda norm: (norm,),
    "set": lambda norm: {norm},
    "dict": lambda norm: {"norm": norm},
    "nested": lambda norm: {"all": [(norm, 1.0)]},
    "attribute": lambda norm: norm,
}


@pytest.mark.guarantee(id="statistics-attributes")
@every_style
@pytest.mark.parametrize("keep", ASIDE.values(), ids=ASIDE.keys())
def test_modules_that_are_kept_aside(style: Any, keep: Any) -> None:
    model = KeepsAside(keep)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)
    twin = copy.deepcopy(model.norm())
    for seed in range(3):
        x = batch(seed)
        twin(model.linear(x).detach())
        style(model, optimizer, x)
        assert same_bits(list(model.norm().buffers()), list(twin.buffers()))


@pytest.mark.guarantee(id="statistics-attributes")
def test_modules_whose_classes_pytorch_has_derived() -> None:
    """As of what is parametrized, and of what FSDP2 shards."""
    model = nn.Sequential(HandWrittenNorm("reassigned"), KeepsAside(lambda norm: [norm]))
    parametrize.register_parametrization(model[0], "gain", nn.Tanh())
    model[1].scale = nn.Parameter(torch.ones(()))
    parametrize.register_parametrization(model[1], "scale", nn.Tanh())
    mean, norm, x = model[0].moving_mean, model[1].norm(), batch()
    with frozen_running_stats(model):
        model(x)
    assert torch.equal(model[0].moving_mean, mean)
    assert int(norm.num_batches_tracked) == 0


def test_what_else_a_model_may_keep_is_left_alone() -> None:
    model = KeepsAside(lambda norm: [norm])
    norm, x = model.norm(), batch()
    model.history = [object()] * 10_000
    model.itself = [model]
    model.itself.append(model.itself)  # type: ignore[arg-type]
    object.__setattr__(model, "parent", weakref.proxy(norm))  # which cannot be hashed
    with frozen_running_stats(model):
        model(x)
    assert int(norm.num_batches_tracked) == 0


def test_a_history_of_pairs_does_not_hide_modules() -> None:
    """Containers are searched up to a number that the pairs reach alone."""
    model = KeepsAside(lambda norm: [norm])
    norm, kept = model.norm(), model.kept
    del model.kept
    model.history = [(0.0, 0.0)] * 99
    model.kept = kept
    with frozen_running_stats(model):
        model(batch())
    assert int(norm.num_batches_tracked) == 0
