"""disable_running_stats, enable_running_stats, frozen_running_stats: in any order, nested, interrupted, on wrappers and
parts.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from norms import batch, forward_only, statistics, unchanged
from torch import nn

from sam_fast import disable_running_stats, enable_running_stats, frozen_running_stats

pytestmark = pytest.mark.usefixtures("forced_backend")


def make_model() -> nn.Sequential:
    """A backbone with a norm, and one more norm behind it, that have seen one batch."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), nn.Linear(3, 5), nn.BatchNorm1d(5))
    model(batch(0))
    return model


@pytest.fixture
def model() -> nn.Sequential:
    return make_model()


class Interrupted(Exception):
    """Raised in the middle of something."""


# ---- disable and enable ----------------------------------------------------------------------------------------------


def test_disable_then_enable(model: nn.Module) -> None:
    before = statistics(model)
    disable_running_stats(model)
    model(batch(1))
    enable_running_stats(model)
    assert unchanged(model, before)


@pytest.mark.guarantee(id="statistics-disabled-twice")
def test_disabling_twice_is_like_once(model: nn.Module) -> None:
    """In the reference the second call saves momentum 0 over the real one, and the statistics never move again."""
    before, expected = statistics(model), forward_only(model, batch(3))
    disable_running_stats(model)
    model(batch(1))
    disable_running_stats(model)
    model(batch(2))
    enable_running_stats(model)
    assert unchanged(model, before)
    model(batch(3))
    assert unchanged(model, expected)


def test_after_enable_batches_count_again_also_after_another_enable(model: nn.Module) -> None:
    expected = forward_only(model, batch(2))
    disable_running_stats(model)
    model(batch(1))
    enable_running_stats(model)
    model(batch(2))
    assert unchanged(model, expected)
    enable_running_stats(model)
    assert unchanged(model, expected)


def test_enable_without_disable_changes_nothing(model: nn.Module) -> None:
    """The reference's example calls enable before every first pass."""
    expected = forward_only(model, batch(1), batch(2))
    enable_running_stats(model)
    model(batch(1))
    enable_running_stats(model)
    model(batch(2))
    assert unchanged(model, expected)


def test_enable_before_the_first_pass_and_disable_before_the_second(model: nn.Module) -> None:
    """The reference example's order: enable, first pass, disable, second pass, and again; nothing after the last second
    pass but enable.
    """
    expected = forward_only(model, batch(1), batch(3))
    for first in (1, 3):
        enable_running_stats(model)
        model(batch(first))
        disable_running_stats(model)
        model(batch(first + 1))
    enable_running_stats(model)
    assert unchanged(model, expected)


def test_an_exception_in_between_costs_nothing_once_enabled(model: nn.Module) -> None:
    """After catching the exception and calling enable, the statistics are back; later steps are correct."""
    expected = forward_only(model, batch(2))
    with pytest.raises(RuntimeError, match="mat1"):
        _second_pass_that_fails(model)
    enable_running_stats(model)
    model(batch(2))
    disable_running_stats(model)
    model(batch(3))
    enable_running_stats(model)
    assert unchanged(model, expected)


def _second_pass_that_fails(model: nn.Module) -> None:
    disable_running_stats(model)
    model(batch(1))
    model(torch.randn(8, 40))


def test_a_model_that_was_moved_while_disabled(model: nn.Module) -> None:
    expected = [s.double() if s.is_floating_point() else s for s in statistics(model)]
    disable_running_stats(model)
    model(batch(1))
    model.double()
    enable_running_stats(model)
    assert unchanged(model, expected)


def test_two_models_are_independent(model: nn.Sequential) -> None:
    other = make_model()
    before, expected = statistics(model), forward_only(other, batch(1))
    disable_running_stats(model)
    model(batch(1))
    other(batch(1))
    enable_running_stats(other)
    assert unchanged(other, expected)
    enable_running_stats(model)
    assert unchanged(model, before)


# ---- Wrappers and parts ----------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Like DataParallel or torch.compile's: another module around the same layers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


@pytest.mark.parametrize("disable_wrapper", [True, False], ids=["disable-wrapper", "disable-inner"])
@pytest.mark.parametrize("enable_wrapper", [True, False], ids=["enable-wrapper", "enable-inner"])
def test_wrapper_and_wrapped_model_are_the_same_to_us(
    model: nn.Module, disable_wrapper: bool, enable_wrapper: bool
) -> None:
    wrapper = Wrapper(model)
    before, expected = statistics(model), forward_only(model, batch(2))
    disable_running_stats(wrapper if disable_wrapper else model)
    wrapper(batch(1))
    enable_running_stats(wrapper if enable_wrapper else model)
    assert unchanged(model, before)
    model(batch(2))
    enable_running_stats(wrapper)
    enable_running_stats(model)
    assert unchanged(model, expected)


@pytest.mark.parametrize("wrapper_first", [True, False], ids=["wrapper-first", "inner-first"])
def test_disabling_wrapper_and_wrapped_is_like_once(model: nn.Module, wrapper_first: bool) -> None:
    wrapper = Wrapper(model)
    before, expected = statistics(model), forward_only(model, batch(3))
    for module, seed in ((wrapper, 1), (model, 2)) if wrapper_first else ((model, 1), (wrapper, 2)):
        disable_running_stats(module)
        model(batch(seed))
    enable_running_stats(model)
    assert unchanged(model, before)
    model(batch(3))
    enable_running_stats(wrapper)
    assert unchanged(model, expected)


def test_a_part_disabled_before_the_whole_is_enabled_with_the_whole(model: nn.Sequential) -> None:
    before, expected = statistics(model), forward_only(model, batch(2))
    disable_running_stats(model[0])
    disable_running_stats(model)
    model(batch(1))
    enable_running_stats(model)
    assert unchanged(model, before)
    model(batch(2))
    enable_running_stats(model[0])
    assert unchanged(model, expected)


def test_parts_disabled_one_by_one_are_enabled_with_the_whole(model: nn.Sequential) -> None:
    before = statistics(model)
    disable_running_stats(model[0])
    disable_running_stats(model[2])
    model(batch(1))
    enable_running_stats(model)
    assert unchanged(model, before)


def test_disabling_a_part_leaves_the_rest_counting(model: nn.Sequential) -> None:
    part = statistics(model[0])
    twin = copy.deepcopy(model)
    twin(batch(1))
    disable_running_stats(model[0])
    model(batch(1))
    enable_running_stats(model[0])
    assert unchanged(model[0], part)
    assert unchanged(model[2], statistics(twin[2]))


def test_enabling_a_part_of_what_was_disabled_leaves_the_rest_disabled(model: nn.Sequential) -> None:
    """As in the reference, where each layer has a switch of its own."""
    before = statistics(model)
    twin = copy.deepcopy(model)
    twin[0](batch(2))
    disable_running_stats(model)
    model(batch(1))
    enable_running_stats(model[0])
    model(batch(2))
    enable_running_stats(model)
    assert unchanged(model[0], statistics(twin[0]))
    assert unchanged(model[2], before[3:])


def test_two_models_in_a_container_that_is_made_for_the_call() -> None:
    """Generator and discriminator, encoder and head: the container is gone when the call returns, the
    layers are not.
    """
    first, second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    before = statistics(first)
    disable_running_stats(nn.ModuleList([first, second]))
    first(batch(1))
    second(batch(1))
    enable_running_stats(nn.ModuleList([first, second]))
    assert unchanged(first, before)
    assert unchanged(second, before)


# ---- frozen_running_stats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3])
def test_frozen_blocks_nest(model: nn.Module, depth: int) -> None:
    def enter(level: int) -> None:
        before = statistics(model)
        with frozen_running_stats(model):
            model(batch(level))
            if level < depth:
                enter(level + 1)
            model(batch(level + 10))
        assert unchanged(model, before)

    enter(1)
    enter(1)


@pytest.mark.parametrize("wrapper_outside", [True, False], ids=["wrapper-outside", "inner-outside"])
def test_frozen_wrapper_and_wrapped_nest(model: nn.Module, wrapper_outside: bool) -> None:
    wrapper, before = Wrapper(model), statistics(model)
    outer, inner = (wrapper, model) if wrapper_outside else (model, wrapper)
    with frozen_running_stats(outer):
        model(batch(1))
        with frozen_running_stats(inner):
            model(batch(2))
        model(batch(3))
    assert unchanged(model, before)


@pytest.mark.guarantee(id="statistics-after-errors")
@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, SystemExit])
def test_frozen_ends_however_the_body_ends(model: nn.Module, error: type[BaseException]) -> None:
    before = statistics(model)

    @frozen_running_stats(model)
    def body() -> None:
        model(batch(1))
        raise error

    with pytest.raises(error):
        body()
    assert unchanged(model, before)


def test_frozen_blocks_and_decorators_end_with_a_return_from_inside(model: nn.Module) -> None:
    before = statistics(model)

    @frozen_running_stats(model)
    def early() -> torch.Tensor:
        with frozen_running_stats(model):
            return model(batch(1))

    for _ in range(2):
        early()
    assert unchanged(model, before)


@pytest.mark.parametrize("change", ["replaced", "added"])
def test_layers_that_change_after_an_earlier_frozen_pass_are_covered(model: nn.Sequential, change: str) -> None:
    """The model is changed, for fine-tuning say: what was kept from the earlier pass no longer fits."""
    with frozen_running_stats(model):
        model(batch(1))
    if change == "replaced":
        model[2] = nn.BatchNorm1d(5, momentum=0.5)
    else:
        model.append(nn.BatchNorm1d(5, momentum=0.5))
    before = statistics(model)
    with frozen_running_stats(model):
        model(batch(2))
    assert unchanged(model, before)


def test_disable_and_enable_inside_a_frozen_block(model: nn.Module) -> None:
    expected = forward_only(model, batch(9))
    before = statistics(model)
    with frozen_running_stats(model):
        model(batch(1))
        disable_running_stats(model)
        model(batch(2))
        enable_running_stats(model)
        model(batch(3))
    assert unchanged(model, before)
    model(batch(9))
    assert unchanged(model, expected)


def test_a_frozen_block_between_disable_and_enable(model: nn.Module) -> None:
    before = statistics(model)
    disable_running_stats(model)
    with frozen_running_stats(model):
        model(batch(1))
    model(batch(2))
    enable_running_stats(model)
    assert unchanged(model, before)


# ---- The model itself is not touched ---------------------------------------------------------------------------------


def test_a_copy_made_while_disabled_is_an_ordinary_model(model: nn.Module) -> None:
    disable_running_stats(model)
    model(batch(1))
    twin = copy.deepcopy(model)
    moved, expected = statistics(model), forward_only(model, batch(2))
    enable_running_stats(twin)
    assert unchanged(twin, moved)
    twin(batch(2))
    assert unchanged(twin, expected)
    enable_running_stats(model)
    assert unchanged(twin, expected)


def test_a_pickled_model_is_an_ordinary_model(model: nn.Module) -> None:
    before = statistics(model)
    disable_running_stats(model)
    twin = pickle.loads(pickle.dumps(model))
    enable_running_stats(model)
    twin(batch(1))
    assert unchanged(model, before)
    assert unchanged(twin, forward_only(model, batch(1)))


def test_state_dict_and_modules_gain_nothing(model: nn.Module) -> None:
    keys, attributes = list(model.state_dict()), [list(vars(m)) for m in model.modules()]
    disable_running_stats(model)
    assert (list(model.state_dict()), [list(vars(m)) for m in model.modules()]) == (keys, attributes)
    enable_running_stats(model)
    with frozen_running_stats(model):
        pass
    assert (list(model.state_dict()), [list(vars(m)) for m in model.modules()]) == (keys, attributes)
