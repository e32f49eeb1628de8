"""BatchNormSnapshot's save and restore, in any order, also of statistics that become other tensors in between."""

from __future__ import annotations

import pytest
import torch
from norms import statistics, two_norms, unchanged
from torch import Tensor, nn

from sam_fast import BatchNormSnapshot, frozen_running_stats

pytestmark = pytest.mark.usefixtures("forced_backend")


@pytest.fixture
def model() -> nn.Module:
    return two_norms()


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
