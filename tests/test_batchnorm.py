"""BatchNormSnapshot and frozen_running_stats: every layer that keeps statistics gets back exactly what it had, every
other is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import same_bits
from norms import KINDS, Kind, MovingNorm, forward_only, statistics, two_norms, unchanged
from torch import nn

from sam_fast import BatchNormSnapshot, frozen_running_stats

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


pytestmark = pytest.mark.usefixtures("forced_backend")


@pytest.fixture
def model() -> nn.Module:
    return two_norms()


# ---- Every layer that keeps statistics -------------------------------------------------------------------------------


@pytest.mark.guarantee(id="statistics-layers")
@every_kind
def test_a_frozen_pass_leaves_the_statistics_bit_for_bit(kind: Kind) -> None:
    model = nn.Sequential(kind.make())
    model(kind.batch(1))
    before = statistics(model)
    with frozen_running_stats(model):
        model(kind.batch(2))
        assert not unchanged(model, before), "the pass must have moved them, or this test shows nothing"
    assert unchanged(model, before)


@every_kind
def test_training_goes_on_as_if_the_frozen_pass_had_not_been(kind: Kind) -> None:
    """Counts matter here: num_batches_tracked, and the cumulative average that is made of it."""
    model = nn.Sequential(kind.make())
    expected = forward_only(model, kind.batch(1), kind.batch(3), kind.batch(5))
    model(kind.batch(1))
    for unseen, seen in ((2, 3), (4, 5)):
        with frozen_running_stats(model):
            model(kind.batch(unseen, mean=50.0))
        model(kind.batch(seen))
    assert unchanged(model, expected)


@pytest.mark.guarantee(id="statistics-after-errors")
@every_kind
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_no_trace(kind: Kind, poison: float) -> None:
    model = nn.Sequential(kind.make())
    model(kind.batch(1))
    before = statistics(model)
    with frozen_running_stats(model):
        model(torch.full_like(kind.batch(2), poison))
    assert unchanged(model, before)


@every_kind
def test_a_frozen_pass_computes_what_a_training_pass_computes(kind: Kind) -> None:
    """The batch's own statistics normalize it, not the running ones."""
    layer = kind.make()
    expected = copy.deepcopy(layer)(kind.batch(1))
    with frozen_running_stats(layer):
        assert same_bits([layer(kind.batch(1))], [expected])


@pytest.mark.guarantee(id="statistics")
def test_the_cumulative_average_by_hand() -> None:
    """momentum=None: the mean of the batch means of the counted passes, 1 and 3; half-counted passes would give
    something else.
    """
    layer = nn.BatchNorm1d(1, momentum=None)
    for counted in (1.0, 3.0):
        layer(torch.full((4, 1), counted))
        with frozen_running_stats(layer):
            layer(torch.full((4, 1), 100.0))
    assert layer.running_mean is not None
    assert layer.running_mean.item() == 2.0
    assert layer.num_batches_tracked is not None
    assert layer.num_batches_tracked.item() == 2


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sync_batchnorm(training: bool) -> None:
    """It does not run on a CPU in training mode, so its buffers are moved by hand."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))).train(
        training
    )
    assert isinstance(model[1], nn.SyncBatchNorm)
    before = statistics(model)
    with frozen_running_stats(model):
        for buffer in model.buffers():
            buffer.add_(7)
    assert unchanged(model, before)


def test_a_layer_used_twice_in_the_model() -> None:
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Linear(3, 3), shared)
    model(torch.randn(8, 3))
    before = statistics(model)
    with frozen_running_stats(model):
        model(torch.randn(8, 3))
    assert unchanged(model, before)


def test_two_layers_that_share_their_buffers() -> None:
    first, second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    second.running_mean = first.running_mean
    model = nn.Sequential(first, second)
    before = statistics(model)
    with frozen_running_stats(model):
        model(torch.randn(8, 3) + 1.0)
    assert unchanged(model, before)
    assert second.running_mean is first.running_mean


def test_statistics_that_are_a_view_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAM_FAST_BACKEND")  # forced, a backend refuses what it cannot take
    layer = nn.BatchNorm1d(3)
    layer.running_mean = torch.arange(6.0).reshape(3, 2)[:, 0]
    before = statistics(layer)
    with frozen_running_stats(layer):
        layer(torch.randn(8, 3))
    assert unchanged(layer, before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_model() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())))
    before = statistics(model)
    with frozen_running_stats(model):
        model(torch.randn(8, 3))
    assert unchanged(model, before)


# ---- Layers and models to leave alone --------------------------------------------------------------------------------


@pytest.mark.guarantee(id="statistics-layers")
def test_a_layer_in_eval_mode_is_left_as_it_is(model: nn.Module) -> None:
    """A frozen backbone: the layer in the middle is in eval mode, the model is not."""
    frozen = model[1].eval()  # type: ignore[index]
    before, objects = statistics(frozen), list(frozen.buffers())
    with frozen_running_stats(model):
        model(torch.randn(8, 4))
    assert unchanged(frozen, before)
    assert all(a is b for a, b in zip(frozen.buffers(), objects, strict=True))
    assert not frozen.training


@pytest.mark.guarantee(id="statistics-layers")
@pytest.mark.parametrize(
    "make",
    [
        nn.Identity,
        lambda: nn.Sequential(),
        lambda: nn.Linear(3, 3),
        lambda: nn.BatchNorm1d(3, track_running_stats=False),
        lambda: nn.InstanceNorm1d(4),  # of one unbatched (4, 3) input
        lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Dropout()),
    ],
    ids=[
        "identity",
        "empty",
        "linear",
        "batchnorm-without-tracking",
        "instancenorm-without-tracking",
        "layernorm-dropout",
    ],
)
def test_a_model_without_statistics_is_no_error(make: Callable[[], nn.Module]) -> None:
    model = make()
    snapshot = BatchNormSnapshot(model)
    snapshot.save()
    with frozen_running_stats(model):
        model(torch.randn(4, 3))
    snapshot.restore()
    assert list(model.buffers()) == []


def test_a_child_that_is_none_is_no_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.register_module("downsample", None)
    before = statistics(model)
    with frozen_running_stats(model):
        model[0](torch.randn(8, 3))
    assert unchanged(model, before)


def test_other_buffers_keep_what_the_frozen_pass_wrote() -> None:
    """A mask, a queue or a spectral norm's vector is no running statistic."""
    layer = nn.BatchNorm1d(3)
    layer.register_buffer("mask", torch.zeros(3))
    with frozen_running_stats(layer):
        layer(torch.randn(8, 3))
        layer.get_buffer("mask").add_(1.0)
    assert layer.get_buffer("mask").tolist() == [1.0, 1.0, 1.0]


def test_nothing_but_values_changes_in_any_module(model: nn.Module) -> None:
    """No attribute is switched, inside or afterwards: that is why compiled models need no recompilation and nothing can
    stay off.
    """

    def attributes() -> list[dict[str, object]]:
        return [
            {name: value for name, value in vars(module).items() if name[0] != "_"} | {"keys": list(vars(module))}
            for module in model.modules()
        ]

    before, buffers, addresses = attributes(), list(model.buffers()), [b.data_ptr() for b in model.buffers()]
    with frozen_running_stats(model):
        assert attributes() == before
        model(torch.randn(8, 4))
    assert attributes() == before
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    assert [b.data_ptr() for b in model.buffers()] == addresses


# ---- Lazy layers, and layers that make their statistics late ---------------------------------------------------------


def test_a_lazy_layer_that_never_ran_stays_lazy() -> None:
    layer = nn.LazyBatchNorm1d()
    with frozen_running_stats(layer):
        pass
    assert isinstance(layer, nn.LazyBatchNorm1d)
    assert layer.has_uninitialized_params()


def test_a_lazy_layer_that_first_runs_inside_is_no_error() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with frozen_running_stats(model):
        model(torch.randn(8, 3))
    assert model[0].running_mean.shape == (3,)
    model(torch.randn(8, 3))


def test_a_lazy_layer_is_covered_from_its_first_pass_on() -> None:
    """What was learned about the model while the layer was lazy (nothing to save) must not be believed later."""
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with frozen_running_stats(model):
        pass
    model(torch.randn(8, 3))
    before = statistics(model)
    with frozen_running_stats(model):
        model(torch.randn(8, 3) + 5.0)
    assert unchanged(model, before)


def test_a_snapshot_covers_a_lazy_layer_from_the_first_save_after_its_first_pass_on() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d())
    snapshot = BatchNormSnapshot(model)
    snapshot.save()
    model(torch.randn(8, 3))
    before = statistics(model)
    snapshot.save()
    model(torch.randn(8, 3) + 5.0)
    snapshot.restore()
    assert unchanged(model, before)


def test_statistics_registered_after_an_earlier_frozen_pass_are_covered() -> None:
    layer = MovingNorm(3)
    del layer.moving_variance
    with frozen_running_stats(layer):
        pass
    layer.register_buffer("moving_variance", torch.ones(3))
    before = statistics(layer)
    with frozen_running_stats(layer):
        layer(torch.randn(8, 3))
    assert unchanged(layer, before)


def test_tracking_switched_on_between_two_frozen_passes_is_covered() -> None:
    layer = nn.BatchNorm1d(3, track_running_stats=False)
    with frozen_running_stats(layer):
        layer(torch.randn(8, 3))
    layer.track_running_stats = True
    layer.running_mean, layer.running_var = torch.zeros(3), torch.ones(3)
    layer.num_batches_tracked = torch.tensor(0)
    before = statistics(layer)
    with frozen_running_stats(layer):
        layer(torch.randn(8, 3))
    assert unchanged(layer, before)
