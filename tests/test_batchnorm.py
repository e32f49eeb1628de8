"""BatchNormSnapshot and frozen_running_stats: every layer that keeps statistics gets back exactly what it had, every
other is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import same_bits
from norms import KINDS, Kind, MovingNorm, forward_only, statistics, unchanged
from torch import Tensor, nn

from sam_fast import BatchNormSnapshot, frozen_running_stats

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


pytestmark = pytest.mark.usefixtures("forced_backend")


@pytest.fixture
def model() -> nn.Module:
    """Two norm layers that have seen one batch."""
    model = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=None))
    )
    model(torch.randn(8, 4))
    return model


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


# ---- save and restore ------------------------------------------------------------------------------------------------


def test_saving_moves_nothing(model: nn.Module) -> None:
    before = statistics(model)
    BatchNormSnapshot(model).save()
    assert unchanged(model, before)


def test_restore_before_save_is_an_error_that_says_so(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="save"):
        BatchNormSnapshot(model).restore()


def test_restore_may_be_repeated(model: nn.Module) -> None:
    snapshot, before = BatchNormSnapshot(model), statistics(model)
    snapshot.save()
    for _ in range(3):
        model(torch.randn(8, 4))
        snapshot.restore()
        assert unchanged(model, before)


def test_a_second_save_replaces_the_first(model: nn.Module) -> None:
    snapshot = BatchNormSnapshot(model)
    snapshot.save()
    model(torch.randn(8, 4))
    later = statistics(model)
    snapshot.save()
    model(torch.randn(8, 4))
    snapshot.restore()
    assert unchanged(model, later)


def test_two_snapshots_of_one_model_do_not_disturb_each_other(model: nn.Module) -> None:
    first, second = BatchNormSnapshot(model), BatchNormSnapshot(model)
    early = statistics(model)
    first.save()
    model(torch.randn(8, 4))
    late = statistics(model)
    second.save()
    first.restore()
    assert unchanged(model, early)
    second.restore()
    assert unchanged(model, late)


def test_every_bit_pattern_comes_back() -> None:
    """NaN payloads, -0.0 and subnormals."""
    layer = nn.BatchNorm1d(4)
    bits = torch.tensor([0x7FC12345, -0x80000000, 1, -0x00400001], dtype=torch.int32)
    layer.running_mean = bits.view(torch.float32).clone()
    before = statistics(layer)
    with frozen_running_stats(layer):
        layer.running_mean.fill_(1.0)
    assert unchanged(layer, before)


# ---- Statistics that become other tensors in between -----------------------------------------------------------------


def as_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
def test_the_model_moves_to_another_dtype_between_save_and_restore(model: nn.Module, dtype: torch.dtype) -> None:
    snapshot, before = BatchNormSnapshot(model), statistics(model)
    snapshot.save()
    model(torch.randn(8, 4))
    model.to(dtype)
    for _ in range(2):
        snapshot.restore()
        assert unchanged(model, as_dtype(before, dtype))
        model(torch.randn(8, 4, dtype=dtype))
    snapshot.save()  # as it is now
    before = statistics(model)
    model(torch.randn(8, 4, dtype=dtype))
    snapshot.restore()
    assert unchanged(model, before)


def test_restore_may_be_repeated_after_data_was_given_another_dtype() -> None:
    layer = nn.BatchNorm1d(3)
    snapshot = BatchNormSnapshot(layer)
    snapshot.save()
    assert layer.running_mean is not None
    layer.running_mean.data = layer.running_mean.data.double()
    for _ in range(3):
        layer.running_mean.fill_(9.0)
        snapshot.restore()
        assert layer.running_mean.tolist() == [0.0, 0.0, 0.0]


def test_a_statistic_that_the_frozen_pass_made_longer_gets_its_length_back() -> None:
    """A history, say. Its old values must not be spread over the new shape in silence."""
    layer = nn.Module()
    layer.register_buffer("running_history", torch.tensor([3.0]))
    with frozen_running_stats(layer):
        layer.running_history = torch.tensor([3.0, 4.0])
    assert layer.get_buffer("running_history").tolist() == [3.0]


def test_a_model_on_the_meta_device_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAM_FAST_BACKEND")  # forced, a backend refuses what it cannot take
    model = nn.BatchNorm1d(3).to("meta")
    with frozen_running_stats(model):
        model(torch.randn(8, 3, device="meta"))
    assert all(b.is_meta for b in model.buffers())


def test_the_first_frozen_pass_in_inference_mode_does_not_spoil_later_ones(model: nn.Module) -> None:
    before = statistics(model)
    with torch.inference_mode(), frozen_running_stats(model):
        model(torch.randn(8, 4))
    with frozen_running_stats(model):
        model(torch.randn(8, 4))
    assert unchanged(model, before)
