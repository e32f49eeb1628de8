"""What TrainStep says of weights and buffers that both passes change: target networks, queues."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sam_fast import SAM, TrainStep


def test_updating_a_target_network_is_warned_of_once() -> None:
    model = nn.Linear(2, 1)
    target, teacher = (nn.Linear(2, 1).requires_grad_(False) for _ in range(2))  # whose weights have the same names
    norm = nn.BatchNorm1d(1)  # its statistics count once anyway

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        target.weight.lerp_(model.weight.detach(), 0.1)
        return (norm(model(x)) - target(x) - teacher(x)).square().mean()

    step, x = TrainStep(model, SAM(model.parameters(), lr=0.1), loss_fn), torch.randn(4, 2)
    with pytest.warns(RuntimeWarning, match="weights that the optimizer does not train, weight; the") as caught:
        step(x)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x)
        TrainStep(model, SAM(model.parameters(), lr=0.1), lambda model, x: (model(x) - target(x)).square().mean())(x)


def test_a_target_network_that_one_pass_updates_is_not_warned_of() -> None:
    """As metrics: ``if not optimizer.perturbed``."""
    model, target = nn.Linear(2, 1), nn.Linear(2, 1).requires_grad_(False)
    optimizer, x = SAM(model.parameters(), lr=0.1), torch.randn(4, 2)

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not optimizer.perturbed:
            target.weight.lerp_(model.weight.detach(), 0.1)
        return (model(x) - target(x)).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainStep(model, optimizer, loss_fn)(x)


class Queue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("mask", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.keys[self.pointer] = x.detach().mean()
        self.pointer += 1
        self.mask.copy_(self.mask.clone())  # as DDP does with all buffers in every pass
        return x * self.mask.sum()


def test_buffers_that_both_passes_change_are_warned_of_once() -> None:
    x = torch.randn(4, 2)

    def made(**options: Any) -> tuple[TrainStep, nn.Module]:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), Queue())
        optimizer = SAM(model.parameters(), lr=0.1)
        return TrainStep(model, optimizer, lambda model, x: model(x).square().mean(), **options), model

    step, model = made()
    with pytest.warns(RuntimeWarning, match="change buffers, 2.keys and 1 more, and so") as caught:
        step(x)
    assert [warning.filename for warning in caught] == [__file__]
    assert model[2].pointer == 2
    model[2].pointer.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x)
        step, model = made(extra_buffers=("keys", "pointer"))
        step(x)
    assert model[2].pointer == 1


def test_a_target_network_is_warned_of_where_other_buffers_are_named() -> None:
    model, target = nn.Sequential(nn.Linear(2, 2), Queue()), nn.Linear(2, 2).requires_grad_(False)

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        target.weight.lerp_(model[0].weight.detach(), 0.1)
        return (model(x) - target(x)).square().mean()

    step = TrainStep(model, SAM(model.parameters(), lr=0.1), loss_fn, extra_buffers=("keys", "pointer"))
    with pytest.warns(RuntimeWarning, match="does not train, weight; the") as caught:
        step(torch.randn(4, 2))
    assert len(caught) == 1


@pytest.mark.parametrize("frozen", [True, False])
def test_an_embedding_that_shortens_its_weights_is_not_warned_of(frozen: bool) -> None:
    """A frozen one becomes the same in both passes; a trained one is put back like any weight."""
    model = nn.Sequential(nn.Embedding(3, 4, max_norm=0.5), nn.Linear(4, 1))
    model[0].weight.requires_grad_(not frozen)
    step = TrainStep(model, SAM(model.parameters(), lr=0.0), lambda model, x: model(x).square().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(torch.tensor([0, 1]))
    assert model[0].weight[:2].norm(dim=1).tolist() == pytest.approx([0.5, 0.5])


def test_looking_for_such_an_embedding_computes_no_weights() -> None:
    """A parametrization such as ``spectral_norm`` changes its buffers each time."""
    computed = []

    class Parametrization(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            computed.append(1)
            return weight * 1.0

    model = nn.Sequential(nn.Embedding(3, 4, max_norm=0.5), nn.Linear(4, 1))
    parametrize.register_parametrization(model[0], "weight", Parametrization())
    step = TrainStep(model, SAM(model[1].parameters(), lr=0.1), lambda model, x: model(x).square().mean())
    computed.clear()
    step(torch.tensor([0, 1]))
    assert len(computed) == 2  # in the passes
