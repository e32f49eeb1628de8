"""torch.compile of a whole training step: few graph breaks, and the results of the step that is not compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import same_bits, values
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sam_fast import SAM

Step = Callable[[nn.Module, SAM, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def two_calls(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> Tensor:
    loss = loss_of(model, x, y)
    optimizer.first_step(zero_grad=True)
    loss_of(model, x, y)
    optimizer.second_step(zero_grad=True)
    return loss


def contexts(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> Tensor:
    with optimizer.first_pass(model):
        loss = loss_of(model, x, y)
    optimizer.first_step(zero_grad=True)
    with optimizer.second_pass(model):
        loss_of(model, x, y)
    optimizer.second_step(zero_grad=True)
    return loss


def closure(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> Tensor:
    return optimizer.step(lambda: loss_of(model, x, y), passes="both")  # type: ignore[no-any-return]


def net(norm: bool) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.guarantee(id="compiled-step")
@pytest.mark.parametrize("step", [two_calls, contexts, closure])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_compiled_step(step: Step, base: type[torch.optim.Optimizer]) -> None:
    norm = step is not two_calls  # in two calls BatchNorm counts twice, compiled or not
    models = [net(norm), net(norm)]
    optimizers = [SAM(model.parameters(), base, lr=0.1) for model in models]
    compiled = torch.compile(step, backend="eager")
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    for _ in range(3):
        loss = step(models[0], optimizers[0], x, y)
        assert torch.equal(compiled(models[1], optimizers[1], x, y), loss)
    assert same_bits(*(values([*model.parameters(), *model.buffers()]) for model in models))
    breaks = sum(counters["graph_break"].values())
    assert breaks <= 12, counters["graph_break"]
