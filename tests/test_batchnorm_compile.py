"""Compiled models: the BatchNorm statistics are right, and nothing is compiled again between the passes."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import SmallNet, batches, same_bits
from norms import statistics
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sam_fast import SAM, disable_running_stats, enable_running_stats, frozen_running_stats


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


Step = Callable[[nn.Module, nn.Module, SAM, Tensor, Tensor], None]


def backward(compiled: nn.Module, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(compiled(x), y).backward()


def two_calls(model: nn.Module, compiled: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    backward(compiled, x, y)
    optimizer.first_step(zero_grad=True)
    disable_running_stats(compiled)
    backward(compiled, x, y)
    optimizer.second_step(zero_grad=True)
    enable_running_stats(compiled)


def two_calls_on_the_inner_model(model: nn.Module, compiled: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    backward(compiled, x, y)
    optimizer.first_step(zero_grad=True)
    disable_running_stats(model)
    backward(compiled, x, y)
    optimizer.second_step(zero_grad=True)
    enable_running_stats(compiled)


def second_pass(model: nn.Module, compiled: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    backward(compiled, x, y)
    optimizer.first_step(zero_grad=True)
    with optimizer.second_pass(compiled):
        backward(compiled, x, y)
    optimizer.second_step(zero_grad=True)


def frozen(model: nn.Module, compiled: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    backward(compiled, x, y)
    optimizer.first_step(zero_grad=True)
    with frozen_running_stats(model):
        backward(compiled, x, y)
    optimizer.second_step(zero_grad=True)


STYLES: list[Step] = [two_calls, two_calls_on_the_inner_model, second_pass, frozen]


def assert_right_and_compiled_once(model: nn.Module, backend: str, style: Step, steps: int = 4) -> None:
    """Train; then, with the same compiled code, the first passes alone: same statistics, and one compilation in all."""
    initial = copy.deepcopy(model.state_dict())
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter)
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9, rho=0.1)
    passes: list[tuple[list[Tensor], Tensor]] = []
    for x, y in batches(steps):
        passes.append(([p.detach().clone() for p in model.parameters()], x))
        style(model, compiled, optimizer, x, y)
    after = statistics(model)
    assert counter.frame_count == 1

    model.load_state_dict(initial)
    for weights, x in passes:
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights, strict=True):
                p.copy_(w)
        compiled(x)
    assert counter.frame_count == 1
    assert same_bits(after, statistics(model))
    assert not same_bits(after, [initial[name] for name, _ in model.named_buffers()])


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_right_statistics_and_no_recompilation(style: Step, compiler: str) -> None:
    assert_right_and_compiled_once(SmallNet(), compiler, style)


def test_switching_momentum_would_have_been_noticed() -> None:
    """What the reference does costs a recompilation: the count above can fail."""
    model = SmallNet()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    (x, _), *_ = batches(1)
    compiled(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    compiled(x)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler")
def test_with_inductor() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 10))
    assert_right_and_compiled_once(model, "inductor", second_pass, steps=2)
