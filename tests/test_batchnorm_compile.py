"""Compiled models: the BatchNorm statistics are right, and nothing is compiled again between the passes."""

from __future__ import annotations

import copy
import gc
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
import torch
from cases import SmallNet, batches, same_bits
from norms import statistics
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.modules import module as torch_module

from sam_fast import SAM, disable_running_stats, enable_running_stats, frozen_running_stats
from sam_fast.batchnorm import _watch


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


Step = Callable[[nn.Module, nn.Module, SAM, Tensor, Tensor], None]


def backward(compiled: nn.Module, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(compiled(x), y).backward()


def two_calls_on_the_inner_model(model: nn.Module, compiled: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    backward(compiled, x, y)
    optimizer.first_step(zero_grad=True)
    disable_running_stats(model)
    backward(compiled, x, y)
    optimizer.second_step(zero_grad=True)
    enable_running_stats(compiled)


def two_calls(model: nn.Module, compiled: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    two_calls_on_the_inner_model(compiled, compiled, optimizer, x, y)


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


def reference_loop(model: nn.Module, compiled: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    enable_running_stats(compiled)
    backward(compiled, x, y)
    optimizer.first_step(zero_grad=True)
    disable_running_stats(compiled)
    backward(compiled, x, y)
    optimizer.second_step(zero_grad=True)


def closure(model: nn.Module, compiled: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    optimizer.step(lambda: backward(compiled, x, y))


def closure_after_a_backward(model: nn.Module, compiled: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    backward(compiled, x, y)
    optimizer.step(lambda: backward(compiled, x, y))


STYLES: list[Step] = [
    two_calls,
    two_calls_on_the_inner_model,
    second_pass,
    frozen,
    reference_loop,
    closure,
    closure_after_a_backward,
]


@contextmanager
def only_warnings_of_ours(action: Literal["always", "error"]) -> Iterator[list[warnings.WarningMessage]]:
    """Collects RuntimeWarnings, or raises them; but for the one that PyTorch has for everything compiled on 3.13.0."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action, RuntimeWarning)
        warnings.filterwarnings("ignore", r"Guards may run slower on Python 3\.13\.0\.", RuntimeWarning)
        yield caught


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """PyTorch warns where a compiled model meets global hooks.

    What other tests have disabled is no longer waited for.
    """
    gc.collect()
    _watch.remove()
    assert not torch_module._global_forward_pre_hooks
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using `torch.compile")
        yield


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
    enable_running_stats(model)

    model.load_state_dict(initial)
    for weights, x in passes:
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights, strict=True):
                p.copy_(w)
        compiled(x)
    assert counter.frame_count == 1
    assert same_bits(after, statistics(model))
    assert not same_bits(after, [initial[name] for name, _ in model.named_buffers()])


@pytest.mark.guarantee(id="statistics-compiled")
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
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)
def test_with_inductor() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 10))
    assert_right_and_compiled_once(model, "inductor", second_pass, steps=2)


# ---- Where no hook is called: a compiled function around the model ---------------------------------------------------


class Registry:
    """Keeps a model where a closure does not lead to."""

    model: nn.Module
    function: Callable[[Tensor], Tensor]


def run(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(function(x), y)
    loss.backward()
    return loss


def first_passes_alone(
    model: nn.Module, function: Callable[[Tensor], Tensor], step: Callable[[Tensor, Tensor], None], data: list
) -> bool:
    """Train; then the first passes alone, with the same code: whether the statistics are the same."""
    initial = copy.deepcopy(model.state_dict())
    passes = []
    for x, y in data:
        passes.append(([p.detach().clone() for p in model.parameters()], x))
        step(x, y)
    after = statistics(model)
    enable_running_stats(model)
    model.load_state_dict(initial)
    for weights, x in passes:
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights, strict=True):
                p.copy_(w)
        function(x)
    return same_bits(after, statistics(model))


@pytest.mark.guarantee(id="statistics-in-closures")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("outside", [False, True], ids=["both-calls", "first-gradients-from-outside"])
def test_a_compiled_function_that_the_closure_leads_to(outside: bool, compiler: str) -> None:
    model = SmallNet()
    counter = CompileCounterWithBackend(compiler)
    function = torch.compile(lambda x: model(x) * 2, backend=counter)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        if outside:
            run(function, x, y)
        optimizer.step(lambda: run(function, x, y))

    with only_warnings_of_ours("error"):
        assert first_passes_alone(model, function, step, batches(3))
    assert counter.frame_count == 1


@pytest.mark.parametrize("as_list", [False, True], ids=["model", "list"])
def test_a_model_that_is_given(as_list: bool) -> None:
    Registry.model = model = SmallNet()
    Registry.function = staticmethod(torch.compile(lambda x: Registry.model(x), backend="eager"))
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        optimizer.step(lambda: run(Registry.function, x, y), model=[nn.ReLU(), model] if as_list else model)

    assert first_passes_alone(model, Registry.function, step, batches(3))


@pytest.mark.guarantee(id="statistics-in-closures")
def test_a_model_that_cannot_be_found_is_asked_for_once() -> None:
    Registry.model = model = SmallNet()
    function = torch.compile(lambda x: Registry.model(x), backend="eager")
    optimizer, loss = SAM(model.parameters(), lr=0.1, rho=0.1), nn.CrossEntropyLoss()
    with only_warnings_of_ours("always") as caught:
        for x, y in batches(3):

            def second(x: Tensor = x, y: Tensor = y) -> Tensor:
                value = loss(function(x), y)
                value.backward()
                return value

            optimizer.zero_grad()
            optimizer.step(second)
    (warning,) = [w for w in caught if issubclass(w.category, RuntimeWarning)]
    assert "model=model" in str(warning.message)
    assert warning.filename == __file__


def test_a_compiled_loss_beside_a_model_is_no_reason_to_warn() -> None:
    model = SmallNet()
    loss = torch.compile(nn.functional.cross_entropy, backend="eager")
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)
    with only_warnings_of_ours("error"):
        for x, y in batches(2):
            optimizer.zero_grad()
            optimizer.step(lambda x=x, y=y: loss(model(x), y).backward())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_disabled_for_good_around_a_compiled_function(compiler: str, affine: bool) -> None:
    """No hook tells of its passes; gradients do: those of the rest of the model where the layers have none."""
    model = SmallNet()
    if not affine:
        model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10), nn.BatchNorm1d(10, affine=False))
        model.eval()(batches(1)[0][0])
        model.train()
    function = torch.compile(lambda x: model(x) * 2, backend=compiler)
    optimizer, before = SAM(model.parameters(), lr=0.1, rho=0.1), statistics(model)
    disable_running_stats(model)
    for x, y in batches(3):
        run(function, x, y)
        optimizer.first_step(zero_grad=True)
        run(function, x, y)
        optimizer.second_step(zero_grad=True)
        assert same_bits(statistics(model), before)
    enable_running_stats(model)


def test_evaluation_and_loading_between_steps_compile_nothing_again_in_the_long_run() -> None:
    model = SmallNet()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)
    counts = []
    for x, y in batches(4):
        reference_loop(model, compiled, optimizer, x, y)
        model.eval()
        compiled(x)
        model.train()
        model.load_state_dict(model.state_dict())
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:1] * 3
    assert counts[0] == 2  # training and evaluation
    enable_running_stats(model)


def test_a_disabled_model_that_is_freed_while_another_is_compiled() -> None:
    """As in a sweep: TorchDynamo makes guards of the hooks that it has found, and allocates enough for a collection."""

    def collecting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        gc.collect()
        return graph.forward

    def train(backend: Callable[..., object] | str) -> nn.Module:
        model = SmallNet()
        model.itself = [model]  # type: ignore[assignment]  # only a collection frees it
        compiled, optimizer = torch.compile(model, backend=backend), SAM(model.parameters(), lr=0.1)
        for x, y in batches(2):
            reference_loop(model, compiled, optimizer, x, y)
        return model

    gc.collect()
    gc.disable()
    try:
        train("eager")
        assert torch_module._has_any_global_hook()
        model = train(collecting)
    finally:
        gc.enable()
    enable_running_stats(model)
    assert not torch_module._has_any_global_hook()
