"""What somebody does to statistics between two steps stands, though they were disabled and not enabled again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import SmallNet, batches, normal
from norms import forward_only, statistics, unchanged
from reference_loop import MixedNet, every_net, load, plain_step, reference_step, trained
from torch import nn
from torch.optim.swa_utils import update_bn

from sam_fast import SAM, disable_running_stats, enable_running_stats, frozen_running_stats
from sam_fast.sharpness import rho_sharpness

pytestmark = pytest.mark.usefixtures("forced_backend", "no_hook_is_left")


def load_assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() + 1 for k, v in model.state_dict().items()}, assign=True)


def reset(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()


def copy_in(model: nn.Module) -> None:
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.copy_(torch.full_like(buffer, 3))


def copy_in_data(model: nn.Module) -> None:
    """No version counter moves."""
    for buffer in model.buffers():
        buffer.data.copy_(torch.full_like(buffer, 5))


def replace(model: nn.Module) -> None:
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.full_like(buffer, 2)


def reestimate(model: nn.Module) -> None:
    update_bn([x for x, _ in batches(3, seed=11)], model)


def to_double_and_back(model: nn.Module) -> None:
    copy_in(model)
    model.double()
    model.float()


CHANGES = [load, load_assigned, reset, copy_in, copy_in_data, replace, reestimate, to_double_and_back]
every_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@pytest.mark.guarantee(id="statistics-changed")
@every_net
@every_change
def test_what_somebody_changes_stands(make: Callable[[], nn.Module], change: Callable[[nn.Module], None]) -> None:
    model, optimizer, expected = trained(make)
    (x, y), *_ = batches(1, seed=3)
    model.eval()
    model(x)
    model.train()
    change(model)
    changed = statistics(model)
    assert not unchanged(model, expected)
    enable_running_stats(model)
    assert unchanged(model, changed)
    expected = forward_only(model, x)
    reference_step(model, optimizer, x, y)
    enable_running_stats(model)
    assert unchanged(model, expected)


@pytest.mark.guarantee(id="statistics-changed")
@every_net
@every_change
def test_what_somebody_changes_stands_where_enable_is_never_called(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], None]
) -> None:
    model = make()
    optimizer = SAM(model.parameters(), lr=0.01)
    disable_running_stats(model)
    for x, y in batches(2):
        plain_step(model, optimizer, x, y)
    change(model)
    changed = statistics(model)
    for x, y in batches(2, seed=4):
        plain_step(model, optimizer, x, y)
        assert unchanged(model, changed)


@every_net
@every_change
def test_what_somebody_changes_after_disable_and_before_the_first_step_stands(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], None]
) -> None:
    """Freeze the statistics, then load a checkpoint, then train."""
    model = make()
    model(batches(1)[0][0])
    optimizer = SAM(model.parameters(), lr=0.01)
    disable_running_stats(model)
    change(model)
    changed = statistics(model)
    for x, y in batches(2, seed=4):
        plain_step(model, optimizer, x, y)
        assert unchanged(model, changed)
    enable_running_stats(model)
    assert unchanged(model, changed)


@pytest.mark.parametrize("change", [load, reset, copy_in, replace], ids=lambda change: change.__name__)
def test_what_somebody_changes_between_disable_and_enable_stands(change: Callable[[nn.Module], None]) -> None:
    model = MixedNet()
    model(batches(1)[0][0])
    disable_running_stats(model)
    change(model)
    changed = statistics(model)
    enable_running_stats(model)
    assert unchanged(model, changed)


@pytest.mark.parametrize("seen", [True, False], ids=["module", "function"])
@pytest.mark.parametrize("order", ["enable-then-step", "step-then-enable", "no-step"])
def test_layers_whose_module_is_not_called(seen: bool, order: str) -> None:
    """A functional second pass: no hook tells of it."""
    norm, weight = nn.BatchNorm1d(3), nn.Parameter(torch.ones(3))
    optimizer = SAM([weight, *norm.parameters()], lr=0.1)

    def run(seed: int) -> None:
        x = normal((8, 3), torch.Generator().manual_seed(seed)) * weight
        statistics_and_weights = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        out = norm(x) if seen else nn.functional.batch_norm(x, *statistics_and_weights, training=True)
        out.square().sum().backward()

    for seed in range(3):
        run(seed)
        first = statistics(norm)
        if order == "no-step":
            disable_running_stats(norm)
            run(seed + 10)
            enable_running_stats(norm)
        else:
            optimizer.first_step(zero_grad=True)
            disable_running_stats(norm)
            run(seed + 10)
            if order == "enable-then-step":
                enable_running_stats(norm)
            optimizer.second_step(zero_grad=True)
            assert unchanged(norm, first)
            enable_running_stats(norm)
        assert unchanged(norm, first)


def test_estimating_anew_is_what_it_is_for_a_model_that_was_never_disabled() -> None:
    model, _, _ = trained(MixedNet)
    twin = copy.deepcopy(model)
    reestimate(model)
    reestimate(twin)
    enable_running_stats(model)
    assert unchanged(model, statistics(twin))


@pytest.mark.guarantee(id="statistics-changed")
def test_what_is_loaded_into_one_model_stands_when_the_others_step_ends() -> None:
    a, of_a, _ = trained(SmallNet)
    b, _, _ = trained(SmallNet)
    load(b)
    changed = statistics(b)
    x, y = batches(1, seed=3)[0]
    reference_step(a, of_a, x, y)
    assert unchanged(b, changed)
    enable_running_stats(b)
    assert unchanged(b, changed)
    enable_running_stats(a)


def test_frozen_layers_that_are_loaded_stand_although_their_weights_are_trained() -> None:
    """Evaluation mode: nothing runs that must be restored, whatever gradients there are."""
    model, optimizer, _ = trained(SmallNet)
    load(model)
    changed = statistics(model)
    model.eval()
    x, y = batches(1)[0]
    plain_step(model, optimizer, x, y)
    assert unchanged(model, changed)


def test_precise_batchnorm_that_sets_a_momentum_of_its_own_counts() -> None:
    """fvcore's recipe: momentum 1, passes without gradients, and an average of what each of them leaves."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).double()
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.5)
    data = [normal((16, 4), torch.Generator().manual_seed(k), torch.float64) for k in range(4)]
    model(data[0]).square().mean().backward()
    optimizer.first_step(zero_grad=True)
    disable_running_stats(model)
    model(data[0]).square().mean().backward()
    optimizer.second_step(zero_grad=True)
    norm, mean = model[1], torch.zeros(6, dtype=torch.float64)
    norm.momentum = 1.0
    with torch.no_grad():
        for k, x in enumerate(data, start=1):
            model(x)
            mean += (norm.running_mean - mean) / k
        expected = torch.stack([model[0](x).mean(0) for x in data]).mean(0)
    assert torch.allclose(mean, expected, rtol=0, atol=1e-12)
    norm.running_mean.copy_(mean)
    enable_running_stats(model)
    assert torch.equal(norm.running_mean, mean)


@pytest.mark.parametrize("left", ["computed", "zeroed", "flat"])
def test_gradients_that_were_there_before_do_not_show_that_layers_have_run(left: str) -> None:
    model = SmallNet()
    optimizer = SAM(model.parameters(), lr=0.01, flatten=left == "flat")
    (x, y), *_ = batches(1)
    if left != "flat":
        nn.functional.cross_entropy(model(x), y).backward()
    if left == "zeroed":
        optimizer.zero_grad(set_to_none=False)
    disable_running_stats(model)
    load(model)
    loaded = statistics(model)
    enable_running_stats(model)
    assert unchanged(model, loaded)


def frozen_pass(model: nn.Module) -> None:
    with frozen_running_stats(model):
        model(batches(1, seed=7)[0][0]).sum().backward()


def measured(model: nn.Module) -> None:
    rho_sharpness(model, lambda model, x, y: nn.functional.cross_entropy(model(x), y), batches(2, seed=7), rho=0.1)


@every_net
@pytest.mark.parametrize("look", [frozen_pass, measured], ids=lambda look: look.__name__)
@pytest.mark.parametrize("change", [load, reset, None])
def test_what_somebody_changes_after_a_pass_that_left_no_trace_stands(
    make: Callable[[], nn.Module], look: Callable[[nn.Module], None], change: Callable[[nn.Module], None] | None
) -> None:
    """Between the steps of a loop that enables the statistics at the start of the next one."""
    model = make()
    optimizer = SAM(model.parameters(), lr=0.01)
    x, y = batches(1)[0]
    reference_step(model, optimizer, x, y)
    expected = statistics(model)
    look(model)
    assert unchanged(model, expected)
    if change is not None:
        change(model)
        expected = statistics(model)
    else:
        with torch.no_grad():
            model(x)  # does not count, as if nobody had looked
        assert unchanged(model, expected)
    enable_running_stats(model)
    assert unchanged(model, expected)
