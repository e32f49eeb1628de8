"""Statistics that were disabled and not enabled again: right whenever a step of SAM has ended."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import SmallNet, batches, same_bits
from norms import KINDS, Kind, Recorder, forward_only, statistics, unchanged
from reference_loop import MixedNet, backward, every_net, load, plain_step, reference_step, trained
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules import module as torch_module
from torch.optim.swa_utils import AveragedModel

from sam_fast import SAM, disable_running_stats, enable_running_stats, frozen_running_stats

pytestmark = pytest.mark.usefixtures("forced_backend", "no_hook_is_left")


# ---- Right when a step has ended -------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="statistics-between-steps")
@every_net
@pytest.mark.parametrize("end", ["second_step", "step", "restore"])
def test_the_model_holds_the_first_passes_when_a_step_has_ended(make: Callable[[], nn.Module], end: str) -> None:
    model, _, expected = trained(make, end)
    assert unchanged(model, expected)


@pytest.mark.guarantee(id="statistics-between-steps")
@every_net
def test_all_copies_see_the_first_passes(make: Callable[[], nn.Module]) -> None:
    """A state dict, a deep copy, a pickle, an average of buffers, evaluation: all made after second_step, before
    enable.
    """
    model, _, expected = trained(make)
    saved = make()
    saved.load_state_dict(copy.deepcopy(model.state_dict()))
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    average.update_parameters(model)
    for seen in (saved, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert unchanged(seen, expected)
    assert all(torch.equal(a, b) for a, b in zip(average.module.buffers(), expected, strict=True))
    twin = make().eval()
    twin.load_state_dict(model.state_dict())
    (x, _), *_ = batches(1, seed=5)
    assert same_bits([model.eval()(x)], [twin(x)])
    # Not `expected`: before PyTorch 2.13 an InstanceNorm rounds its statistics anew in evaluation.
    assert unchanged(model, list(twin.buffers()))


def test_hooks_on_the_base_optimizers_step_see_the_first_passes() -> None:
    model = SmallNet()
    optimizer, recorder, seen = SAM(model.parameters(), lr=0.1), Recorder(model), []
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.append(statistics(model)))
    (x, y), *_ = batches(1)
    recorder.first_pass(x)
    reference_step(model, optimizer, x, y)
    assert same_bits(seen[0], recorder.replay())


def test_a_step_with_a_closure_puts_back_what_is_disabled() -> None:
    """Disabled for good: momentum 0 in the reference. Neither pass counts."""
    model = SmallNet()
    optimizer, before = SAM(model.parameters(), lr=0.1), statistics(model)
    disable_running_stats(model)
    for x, y in batches(2):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert unchanged(model, before)


def test_a_gradient_scaler_that_skips_the_step() -> None:
    model = SmallNet()
    optimizer, recorder = SAM(model.parameters(), lr=0.1), Recorder(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    (x, y), *_ = batches(1)
    recorder.first_pass(x)
    backward(model, x, y)
    optimizer.first_step(zero_grad=True)
    disable_running_stats(model)
    scaler.scale(cross_entropy(model(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    assert not optimizer.perturbed
    assert unchanged(model, recorder.replay())


# ---- Disabled for good -----------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="statistics-between-steps")
@every_net
def test_enable_is_never_called(make: Callable[[], nn.Module]) -> None:
    model = make()
    optimizer, before = SAM(model.parameters(), lr=0.1), statistics(model)
    disable_running_stats(model)
    for x, y in batches(3):
        plain_step(model, optimizer, x, y)
        assert unchanged(model, before)
    x, _ = batches(1)[0]
    expected = forward_only(model, x)
    enable_running_stats(model)
    assert unchanged(model, before)
    model(x)
    assert unchanged(model, expected)


@every_net
def test_disable_in_every_step_and_enable_only_at_the_end(make: Callable[[], nn.Module]) -> None:
    """Only the very first pass counts: in the reference momentum is 0 from the first call on."""
    model = make()
    optimizer, recorder = SAM(model.parameters(), lr=0.1), Recorder(model)
    for index, (x, y) in enumerate(batches(3)):
        if index == 0:
            recorder.first_pass(x)
        backward(model, x, y)
        optimizer.first_step(zero_grad=True)
        disable_running_stats(model)
        backward(model, x, y)
        disable_running_stats(model)
        optimizer.second_step(zero_grad=True)
        assert unchanged(model, recorder.replay())
    enable_running_stats(model)
    assert unchanged(model, recorder.replay())


@pytest.mark.parametrize("when", ["before-the-first-pass", "before-first-step"])
def test_disabled_before_first_step(when: str) -> None:
    model = SmallNet()
    optimizer, recorder = SAM(model.parameters(), lr=0.1), Recorder(model)
    (x, y), *_ = batches(1)
    if when == "before-the-first-pass":
        disable_running_stats(model)
    else:
        recorder.first_pass(x)
    backward(model, x, y)
    disable_running_stats(model)
    optimizer.first_step(zero_grad=True)
    backward(model, x, y)
    optimizer.second_step(zero_grad=True)
    assert unchanged(model, recorder.replay())


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_passes_between_the_end_of_a_step_and_enable_do_not_count(kind: Kind, grad: bool) -> None:
    model = nn.Sequential(kind.make())
    model(kind.batch(1))
    optimizer = SAM([nn.Parameter(torch.ones(1))], lr=0.1)
    disable_running_stats(model)
    before = statistics(model)
    optimizer.restore()
    for seed in (2, 3):
        with torch.set_grad_enabled(grad):
            model(kind.batch(seed))
        if not grad:
            assert unchanged(model, before)
    enable_running_stats(model)
    assert unchanged(model, before)


def test_a_pass_without_gradients_that_raises_does_not_count_either() -> None:
    model, optimizer, expected = trained(SmallNet)
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(torch.randn(4, 1, 4, 4))  # too small for the head, behind both norms
    assert unchanged(model, expected)
    x, y = batches(1)[0]
    reference_step(model, optimizer, x, y)
    enable_running_stats(model)


def test_part_of_what_was_disabled_is_enabled_after_the_step() -> None:
    model, _, expected = trained(SmallNet)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    enable_running_stats(norms[0])
    x, _ = batches(1, seed=3)[0]
    twin = copy.deepcopy(model)
    twin(x)
    model(x)
    with torch.no_grad():
        model(x)
        twin(x)
    enable_running_stats(model)
    assert unchanged(norms[0], statistics(next(m for m in twin.modules() if isinstance(m, nn.BatchNorm2d))))
    assert unchanged(norms[1], expected[3:])


# ---- Several models and optimizers -----------------------------------------------------------------------------------


def test_the_end_of_one_optimizers_step_leaves_another_models_step_right() -> None:
    """A whole step of A, at any moment of B's."""
    for moment in range(5):
        a, b = SmallNet(), MixedNet()
        of_a, of_b = SAM(a.parameters(), lr=0.1), SAM(b.parameters(), lr=0.1)
        record_a, record_b = Recorder(a), Recorder(b)
        for step, ((x, y), (z, _)) in enumerate(zip(batches(3), batches(3, seed=9), strict=True)):

            def step_a(now: int, x: Tensor = z, y: Tensor = y) -> None:
                if now == moment:  # noqa: B023
                    record_a.first_pass(x)  # noqa: B023
                    reference_step(a, of_a, x, y)  # noqa: B023

            step_a(0)
            enable_running_stats(b)
            record_b.first_pass(x)
            backward(b, x, y)
            step_a(1)
            of_b.first_step(zero_grad=True)
            step_a(2)
            disable_running_stats(b)
            step_a(3)
            backward(b, x, y)
            step_a(4)
            of_b.second_step(zero_grad=True)
            assert unchanged(b, record_b.replay()), (moment, step)
            assert unchanged(a, record_a.replay()), (moment, step)


# ---- Exceptions, freed models, no lasting hooks ----------------------------------------------------------------------


def test_an_exception_between_the_calls() -> None:
    model, optimizer, _ = trained(SmallNet)
    twin = SmallNet()
    twin.load_state_dict(model.state_dict())
    x, y = batches(1, seed=3)[0]
    enable_running_stats(model)
    backward(model, x, y)
    twin(x)
    optimizer.first_step(zero_grad=True)
    disable_running_stats(model)
    with pytest.raises(RuntimeError):
        backward(model, x[:, :, :4, :4], y)
    optimizer.restore()
    assert unchanged(model, statistics(twin))
    load(model)
    changed = statistics(model)
    enable_running_stats(model)
    assert unchanged(model, changed)


def test_a_model_that_is_freed_while_disabled_takes_everything_along() -> None:
    model, optimizer, _ = trained(SmallNet)
    other, of_other, _ = trained(SmallNet)
    assert torch_module._has_any_global_hook()
    enable_running_stats(other)
    del model, optimizer
    gc.collect()
    assert not torch_module._has_any_global_hook()
    x, y = batches(1)[0]
    reference_step(other, of_other, x, y)
    enable_running_stats(other)
    assert not torch_module._has_any_global_hook()


def test_there_is_no_hook_but_between_the_end_of_a_step_and_the_next_pass() -> None:
    model = SmallNet()
    optimizer = SAM(model.parameters(), lr=0.1)
    seen = []
    model.features[0].register_forward_pre_hook(lambda *_: seen.append(bool(torch_module._has_any_global_hook())))
    disable_running_stats(model)
    for x, y in batches(3):
        plain_step(model, optimizer, x, y)
        assert torch_module._has_any_global_hook()
    assert seen == [False] * 6
    enable_running_stats(model)
    assert not torch_module._has_any_global_hook()


def test_frozen_blocks_inside() -> None:
    model, _, expected = trained(MixedNet)
    x, y = batches(1, seed=3)[0]
    with frozen_running_stats(model):
        backward(model, x, y)
    assert unchanged(model, expected)
    enable_running_stats(model)
    assert unchanged(model, expected)
