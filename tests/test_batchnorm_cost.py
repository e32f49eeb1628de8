"""What keeping the statistics right costs: native calls per device and dtype, nothing else once warm, and no model kept
alive.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sam_fast import SAM, BatchNormSnapshot, disable_running_stats, enable_running_stats, frozen_running_stats
from sam_fast.backends import available, cpu

pytestmark = pytest.mark.usefixtures("forced_backend")


# ---- Calls -----------------------------------------------------------------------------------------------------------


class Calls:
    """Counts the calls of the native module's functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        for name in ("backup", "restore"):
            monkeypatch.setattr(cpu._cpu, name, self._counted(name, getattr(cpu._cpu, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.counts[name] += 1
            return function(*args)

        return call


needs_cpu = pytest.mark.skipif("cpu" not in available(), reason="the native cpu backend is not built")
cpu_only = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpu)])


@cpu_only
@pytest.mark.parametrize("layers", [1, 10, 100])
def test_one_native_call_per_dtype_whatever_the_number_of_layers(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 statistics and int64 counts: two calls to save, two to restore. The first time and later."""
    model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(layers)])
    calls = Calls(monkeypatch)
    for times in (1, 2, 3):
        disable_running_stats(model)
        enable_running_stats(model)
        assert calls.counts == {"backup": 2 * times, "restore": 2 * times}


@cpu_only
def test_each_further_dtype_costs_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        *[nn.BatchNorm1d(3).to(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16) for _ in range(5)]
    )
    calls = Calls(monkeypatch)
    with frozen_running_stats(model):
        pass
    assert calls.counts == {"backup": 4, "restore": 4}


@cpu_only
def test_a_model_without_statistics_costs_no_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    with frozen_running_stats(nn.Linear(3, 3)):
        pass
    assert calls.counts == {}


class Operators(TorchDispatchMode):
    """Lists the operators that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@cpu_only
@pytest.mark.parametrize("style", ["frozen", "disable-enable", "snapshot"])
def test_once_warm_the_kernels_are_all_that_runs(style: str) -> None:
    """No operator of PyTorch, so no allocation either."""
    model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(5)])
    saved = BatchNormSnapshot(model)

    def once() -> None:
        if style == "frozen":
            with frozen_running_stats(model):
                pass
        elif style == "disable-enable":
            disable_running_stats(model)
            enable_running_stats(model)
        else:
            saved.save()
            saved.restore()

    once()
    with Operators() as operators:
        once()
    assert operators.names == []


def python_calls(function: Callable[[], None]) -> int:
    """How often a function of Python's is entered, or a generator resumed."""
    count = 0

    def see(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_models_that_were_left_disabled_cost_a_step_of_another_one_little() -> None:
    """As those of a federation's clients, each with an optimizer: not a look at each of their layers."""
    layers = 20
    x = torch.randn(8, 3)

    def make() -> tuple[nn.Module, SAM]:
        model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(layers)])
        return model, SAM(model.parameters(), lr=0.1)

    def iteration(model: nn.Module, optimizer: SAM) -> None:
        enable_running_stats(model)
        model(x).square().mean().backward()
        optimizer.first_step(zero_grad=True)
        disable_running_stats(model)
        model(x).square().mean().backward()
        optimizer.second_step(zero_grad=True)

    clients = [make() for _ in range(30)]
    counts = []
    for before, some in ((0, clients[:10]), (10, clients)):
        for client in some[before:]:
            iteration(*client)
        iteration(*clients[0])
        counts.append(python_calls(lambda: iteration(*clients[0])))
    assert (counts[1] - counts[0]) / 20 < layers


# ---- Nobody keeps a model alive --------------------------------------------------------------------------------------


class HookedNet(nn.Module):
    """A layer that knows its model, as with every hook that is a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.norm.register_forward_hook(self.remember)

    def remember(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.last = output.detach()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


def use_frozen(model: nn.Module) -> None:
    with frozen_running_stats(model):
        model(torch.randn(8, 3))


def use_switches(model: nn.Module) -> None:
    disable_running_stats(model)
    model(torch.randn(8, 3))
    enable_running_stats(model)


def use_disable_only(model: nn.Module) -> None:
    disable_running_stats(model)


def use_inner_and_wrapper(model: nn.Module) -> None:
    disable_running_stats(nn.Sequential(model))
    enable_running_stats(model)


USES = [use_frozen, use_switches, use_disable_only, use_inner_and_wrapper]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
        lambda: nn.BatchNorm1d(3),
        HookedNet,
        lambda: torch.jit.script(nn.BatchNorm1d(3)),
    ],
    ids=["inside-a-model", "the-layer-is-the-model", "layer-with-a-hook-to-its-model", "scripted"],
)
def test_a_model_is_freed_when_its_owner_lets_it_go(
    make: Callable[[], nn.Module], use: Callable[[nn.Module], None]
) -> None:
    model = make()
    use(model)
    alive = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm1d(3), HookedNet], ids=["the-layer-is-the-model", "layer-with-a-hook-to-its-model"]
)
def test_a_snapshot_does_not_keep_its_model_alive(make: Callable[[], nn.Module]) -> None:
    model = make()
    saved = BatchNormSnapshot(model)
    saved.save()
    model(torch.randn(8, 3))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    saved.restore()  # nobody is there to see it, and that is no error
