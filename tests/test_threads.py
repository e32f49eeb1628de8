"""Several threads, each of which trains a model of its own: none disturbs the statistics of another's."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from threading import Semaphore, Thread
from typing import Any

import pytest
import torch
from cases import same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam_fast import SAM, disable_running_stats, enable_running_stats

X = torch.linspace(-1, 2, 240).reshape(10, 8, 3)


@pytest.fixture
def _often_another_thread() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_another_thread(call: Callable[[], Any]) -> None:
    thread = Thread(target=call)
    thread.start()
    thread.join()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1))


def loss(model: Any, x: Tensor) -> Tensor:
    value: Tensor = model(x).square().mean()
    value.backward()
    return value


def train_by_the_reference(model: nn.Module) -> None:
    """With passes without gradients between the steps, which do not count either."""
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)
    for x in X:
        enable_running_stats(model)
        loss(model, x)
        optimizer.first_step(zero_grad=True)
        disable_running_stats(model)
        loss(model, x)
        optimizer.second_step(zero_grad=True)
        with torch.no_grad():
            model(x)


def train_by_closures(model: nn.Module) -> None:
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1, closure="both")
    for x in X:
        optimizer.step(lambda x=x: loss(model, x))


@pytest.mark.usefixtures("_often_another_thread")
@pytest.mark.parametrize("train", [train_by_the_reference, train_by_closures])
def test_four_models_in_four_threads(train: Callable[[nn.Module], None]) -> None:
    models = [net() for _ in range(4)]
    twins = copy.deepcopy(models)
    errors: list[BaseException] = []

    def run(model: nn.Module) -> None:
        try:
            train(model)
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for model, twin in zip(models, twins, strict=True):
        train(twin)
        assert same_bits(list(model.state_dict().values()), list(twin.state_dict().values()))


class Interrupted(nn.BatchNorm1d):
    """A layer in whose forward pass something else happens."""

    meanwhile: Callable[[], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.meanwhile is not None:
            in_another_thread(self.meanwhile)
        return super().forward(x)


def test_a_step_that_ends_in_another_thread_settles_its_own_models() -> None:
    layer = Interrupted(4, affine=False)
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 1))
    optimizer = SAM(model.parameters(), lr=0.1)
    loss(model, X[0])
    expected = [b.clone() for b in model.buffers()]
    optimizer.first_step(zero_grad=True)
    disable_running_stats(model)
    layer.meanwhile = lambda: train_by_the_reference(net())
    loss(model, X[0])
    layer.meanwhile = None
    optimizer.second_step()
    assert same_bits(list(model.buffers()), expected)


def test_a_step_under_way_in_another_thread_is_not_this_ones() -> None:
    """What is disabled beside it does not wait for its end, and may be loaded."""
    other = SAM([nn.Parameter(torch.ones(1))], lr=0.1)
    in_another_thread(other.first_step)
    model = net()
    disable_running_stats(model)
    model.load_state_dict(net().state_dict() | {"1.running_mean": torch.ones(4)})
    enable_running_stats(model)
    other.restore()
    assert same_bits([model[1].running_mean], [torch.ones(4)])


def test_a_model_that_was_disabled_in_another_thread_is_settled() -> None:
    model = net()
    in_another_thread(lambda: disable_running_stats(model))
    optimizer = SAM(model.parameters(), lr=0.1)
    for x in X[:2]:
        loss(model, x)
        optimizer.first_step(zero_grad=True)
        loss(model, x)
        optimizer.second_step(zero_grad=True)
    assert int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize("moved", ["disable", "second forward", "second step", "all three"])
def test_a_step_whose_parts_run_in_several_threads_is_one_step(moved: str) -> None:
    """As where each part is given to an executor."""
    model = net()
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)

    def run(part: str, call: Callable[[], Any]) -> None:
        in_another_thread(call) if moved in (part, "all three") else call()

    for x in X[:3]:
        enable_running_stats(model)
        loss(model, x)
        expected = [b.clone() for b in model.buffers()]
        optimizer.first_step(zero_grad=True)
        run("disable", lambda: disable_running_stats(model))
        run("second forward", lambda x=x: loss(model, x))
        run("second step", optimizer.second_step)
        optimizer.zero_grad()
        assert same_bits(list(model.buffers()), expected)


def test_layers_that_a_backward_pass_runs_anew_in_its_own_thread_are_settled() -> None:
    """As reentrant checkpoints do on a GPU, where the first forward pass has no gradients and does not count."""
    model = net()
    optimizer = SAM(model.parameters(), lr=0.1)
    disable_running_stats(model)
    for x in X[:3]:
        for end in (optimizer.first_step, optimizer.second_step):
            value = checkpoint(model, x.clone().requires_grad_(), use_reentrant=True).square().mean()
            in_another_thread(value.backward)
            end()
            optimizer.zero_grad()
        assert int(model[1].num_batches_tracked) == 0


def test_functional_calls_of_another_thread_count_while_a_closure_runs() -> None:
    mine, other = net(), net()
    own = {name: b.clone() for name, b in other.named_buffers()}
    optimizer = SAM(mine.parameters(), lr=0.1, closure="both")

    def closure() -> Tensor:
        in_another_thread(lambda: torch.func.functional_call(other, own, X[0]))
        return loss(mine, X[0])

    for _ in range(3):
        optimizer.step(closure)
    assert int(own["1.num_batches_tracked"]) == 6
    assert int(mine[1].num_batches_tracked) == 3


def test_models_of_other_threads_count_meanwhile() -> None:
    """Forward passes of another thread, which trains another model, are not those of the closure."""
    other, mine = nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer, x = SAM(mine.parameters(), lr=0.1), torch.randn(8, 3)
    begin, end = Semaphore(0), Semaphore(0)

    def work() -> None:
        for _ in range(10):
            begin.acquire()
            other(torch.ones(8, 3))
            end.release()

    def closure() -> None:
        mine(x).sum().backward()
        begin.release()
        end.acquire()

    thread = Thread(target=work)
    thread.start()
    for _ in range(5):
        optimizer.step(closure, passes="both")
    thread.join()
    assert int(other.num_batches_tracked) == 10
    assert int(mine[1].num_batches_tracked) == 5
