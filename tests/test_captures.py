"""Steps in a graph, of which one half is captured and the other is not; on the CPU, with a capture that is faked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from cases import buckets_of, give, make_params, same_bits, values
from torch import nn

from sam_fast import SAM, Schedule, backends, devices
from sam_fast.backends import native

pytestmark = pytest.mark.parametrize("backend", [name for name in ("cpu", "torch") if name in backends.available()])
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
Capture = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """``capture(optimizer)``: what is launched inside has not run when the block ends."""
    capturing = False
    for module in (devices, native, backends.torch):
        monkeypatch.setattr(module, "can_capture", lambda device: True)
        monkeypatch.setattr(module, "is_capturing", lambda device: capturing)

    @contextmanager
    def captured(optimizer: SAM) -> Iterator[None]:
        nonlocal capturing
        params = [p for group in optimizer.param_groups for p in group["params"]]
        written = [*params, *(bucket.backup for bucket in buckets_of(optimizer))]
        before, capturing = values(written), True
        try:
            yield
        finally:
            capturing = False
            for tensor, old in zip(written, before, strict=True):
                tensor.data.copy_(old)

    return captured


def after_a_step(backend: str, flatten: bool, schedule: Schedule | None = None) -> tuple[SAM, list[nn.Parameter]]:
    """The backup holds the weights of the step before."""
    params = make_params([100, 7])
    optimizer = SAM(params, torch.optim.SGD, backend=backend, flatten=flatten, schedule=schedule, **MOMENTUM)
    optimizer.first_step()
    optimizer.second_step()
    give(params, 1)
    return optimizer, params


def give_up(optimizer: SAM, params: list[nn.Parameter], before: list[torch.Tensor]) -> None:
    with pytest.warns(RuntimeWarning, match="captured in a graph on cpu, and the end of its step was not"):
        optimizer.restore()
    assert same_bits(params, before)
    assert not optimizer.perturbed


def finish(optimizer: SAM, params: list[nn.Parameter], backend: str, flatten: bool) -> None:
    """A step from here has the bits of one that nothing came before."""
    twin_optimizer, twin = after_a_step(backend, flatten)
    for each in (optimizer, twin_optimizer):
        each.first_step()
        each.second_step()
    assert same_bits(params, twin)


def test_a_capture_that_ended_in_mid_step_has_moved_nothing(capture: Capture, backend: str, flatten: bool) -> None:
    """The backup was not written either: to put it back would undo the step before."""
    optimizer, params = after_a_step(backend, flatten)
    before = values(params)
    with capture(optimizer):
        optimizer.first_step()
    give_up(optimizer, params, before)
    finish(optimizer, params, backend, flatten)


def test_a_captured_first_step_has_a_captured_second_step(capture: Capture, backend: str, flatten: bool) -> None:
    optimizer, params = after_a_step(backend, flatten)
    before = values(params)
    with capture(optimizer):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="captured in a graph on cpu, and the end of its step is not"):
        optimizer.second_step()
    give_up(optimizer, params, before)
    finish(optimizer, params, backend, flatten)


def test_a_second_step_is_not_captured_alone(capture: Capture, backend: str, flatten: bool) -> None:
    """It would not run, and the weights stay at w + e."""
    optimizer, params = after_a_step(backend, flatten)
    optimizer.first_step()
    for end in (optimizer.second_step, optimizer.restore):
        with pytest.raises(RuntimeError, match=r"not captured in a graph.*would be"), capture(optimizer):
            end()
        assert optimizer.perturbed
    optimizer.restore()
    finish(optimizer, params, backend, flatten)


def test_whole_steps_are_captured(capture: Capture, backend: str, flatten: bool) -> None:
    optimizer, params = after_a_step(backend, flatten)
    state = [entry for p in params for entry in optimizer.state[p].values()]
    before = values(state)
    with capture(optimizer):
        for end in (optimizer.second_step, optimizer.restore):
            optimizer.first_step()
            end()
    for tensor, old in zip(state, before, strict=True):
        tensor.copy_(old)
    finish(optimizer, params, backend, flatten)


def test_state_is_not_made_in_a_graph(capture: Capture, backend: str, flatten: bool) -> None:
    """Every replay would make it anew: momentum and step counters would never grow."""
    params = make_params([100, 7])
    optimizer = SAM(params, torch.optim.SGD, backend=backend, flatten=flatten, **MOMENTUM)
    with capture(optimizer):
        optimizer.first_step()
        with pytest.raises(RuntimeError, match=r"has yet to make its state.*Take a few eager steps first"):
            optimizer.second_step()
    assert not optimizer.state


@pytest.mark.parametrize(
    ("schedule", "steps", "words"),
    [
        (Schedule(start=0.5, total=10), 2, "which does not perturb"),
        (Schedule(every=2), 2, "which perturbs"),
        (Schedule(stop=5), 2, "which perturbs"),
        (Schedule(start=0.5, total=10), 5, None),
        (Schedule(start=0.2, stop=1.0, total=10), 5, None),
        (Schedule(stop=2), 2, None),
    ],
    ids=["before-start", "every-other", "before-stop", "after-start", "to-the-end", "after-stop"],
)
def test_a_graph_that_does_not_follow_its_schedule_is_warned_of(
    capture: Capture, backend: str, flatten: bool, schedule: Schedule, steps: int, words: str | None
) -> None:
    """Replays do not count: with a graph from before the start, training would be SGD's to the end."""
    optimizer, params = after_a_step(backend, flatten, schedule=schedule)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, steps + 2):
            give(params, step)
            with capture(optimizer) if step >= steps else nullcontext():
                optimizer.first_step()
                optimizer.second_step()
    messages = [str(w.message) for w in caught if "captured" in str(w.message)]
    assert len(messages) == (words is not None)
    assert words is None or (words in messages[0] and f"step {steps} was captured" in messages[0])
