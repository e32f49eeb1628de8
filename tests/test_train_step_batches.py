"""What TrainStep cuts a batch into, whatever the batch is made of."""

from __future__ import annotations

from collections import UserDict, defaultdict
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import nn

from sam_fast import SAM, TrainStep
from sam_fast.sharpness import rho_sharpness

PARTS: list[dict[str, Any]] = [{"ascent": 0.25}, {"micro_batches": 4}]


class Extended(NamedTuple):
    x: torch.Tensor
    extra: Any


def test_nested_batches_are_thinned_where_the_rows_are() -> None:
    model, seen = nn.Linear(5, 1), []

    def loss(model: nn.Module, batch: Any, names: str) -> torch.Tensor:
        seen.append(
            (len(batch["pair"].x), len(batch["pair"].extra[0]), len(batch["table"]), batch["scale"].dim(), names)
        )
        return model(batch["pair"].x).square().mean()

    x = torch.randn(8, 5)
    batch = {"pair": Extended(x, [torch.ones(8)]), "table": torch.ones(3, 2), "scale": torch.tensor(2.0)}
    TrainStep(model, SAM(model.parameters(), lr=0.1), loss, ascent=0.25)(batch, "abc")
    assert seen == [(2, 2, 3, 0, "abc"), (8, 8, 3, 0, "abc")]


def test_ascent_may_be_changed_between_steps() -> None:
    """As ``micro_batches``: setting it had no effect."""
    model, rows = nn.Linear(5, 1), []

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return model(x).square().mean()

    step, x = TrainStep(model, SAM(model.parameters(), lr=0.1), loss, ascent=0.25), torch.randn(8, 5)
    step(x)
    step.ascent = 1.0
    assert step(x).sharpness is not None
    assert rows == [2, 8, 8, 8]
    step.ascent = 2.0
    with pytest.raises(ValueError, match="ascent must be"):
        step(x)


def test_what_a_batch_is_in_stays_what_it_is() -> None:
    model, seen = nn.Linear(5, 1), []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append((type(batch), batch["missing"]))
        return model(batch["x"]).square().mean()

    batch = defaultdict(int, x=torch.randn(8, 5))
    TrainStep(model, SAM(model.parameters(), lr=0.1), loss, ascent=0.25)(batch)
    assert seen == [(defaultdict, 0)] * 2


class Encoding(UserDict[str, Any]):
    """As a tokenizer's, which has attributes beside its entries."""

    def __init__(self, data: Any = None, language: str = "unknown") -> None:
        super().__init__(data)
        self.language, self.weight = language, torch.ones(8)


@pytest.mark.parametrize("options", PARTS)
def test_a_part_of_a_batch_has_its_attributes(options: dict[str, Any]) -> None:
    model, seen = nn.Linear(5, 1), []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append((batch.language, len(batch["x"]), len(batch.weight)))
        return (model(batch["x"]).squeeze(1).square() * batch.weight).mean()

    batch = Encoding({"x": torch.randn(8, 5)}, "en")
    TrainStep(model, SAM(model.parameters(), lr=0.1), loss, **options)(batch)
    assert seen == ([("en", 2, 2), ("en", 8, 8)] if "ascent" in options else [("en", 2, 2)] * 8)
    assert len(batch["x"]) == len(batch.weight) == 8


class Rows(UserDict[str, torch.Tensor]):
    """As a TensorDict: has a shape, is cut itself, and takes no entry with other rows."""

    def __init__(self, data: dict[str, torch.Tensor]) -> None:
        self.shape = (len(next(iter(data.values()))),)
        super().__init__(data)

    def __getitem__(self, key: Any) -> Any:
        return Rows({k: v[key] for k, v in self.data.items()}) if isinstance(key, slice) else self.data[key]

    def __setitem__(self, key: str, item: torch.Tensor) -> None:
        assert len(item) == self.shape[0]
        super().__setitem__(key, item)


@pytest.mark.parametrize("options", PARTS)
def test_a_mapping_with_a_shape_is_cut_as_a_whole(options: dict[str, Any]) -> None:
    model, seen = nn.Linear(5, 1), set()

    def loss(model: nn.Module, batch: Rows) -> torch.Tensor:
        seen.add((type(batch), len(batch["x"]), len(batch["y"])))
        return model(batch["x"]).square().mean()

    TrainStep(model, SAM(model.parameters(), lr=0.1), loss, **options)(
        Rows({"x": torch.randn(8, 5), "y": torch.zeros(8)})
    )
    assert seen == ({(Rows, 2, 2), (Rows, 8, 8)} if "ascent" in options else {(Rows, 2, 2)})


def same(one: Any, other: Any) -> bool:
    """Whether two samples hold the same objects."""
    return (
        one.keys() == other.keys() and all(one[k] is other[k] for k in one)
        if isinstance(one, dict)
        else (one is other or (isinstance(one, list) and one == other))
    )


@pytest.mark.parametrize("options", PARTS)
@pytest.mark.parametrize(
    "kind",
    [
        lambda i: str(i),
        lambda i: {"index": torch.tensor(float(i)), "boxes": torch.ones(i, 4)},  # the last one has 8 rows itself
        lambda i: torch.full((i,), float(i)),
        lambda i: None if i % 2 else [i],
    ],
    ids=["captions", "boxes", "tensors that differ in size", "None"],
)
@pytest.mark.parametrize("container", [list, tuple])
def test_lists_of_samples_are_cut_as_the_rows_are(options: dict[str, Any], kind: Any, container: Any) -> None:
    """A detector pairs images with boxes one by one: it would have taken other images' boxes without a word."""
    model, samples = nn.Linear(5, 1), container(kind(i) for i in range(1, 9))

    def loss(model: nn.Module, x: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        assert type(batch["samples"]) is container
        assert len(batch["samples"]) == len(x)
        assert all(same(sample, samples[int(row[0]) - 1]) for sample, row in zip(batch["samples"], x, strict=True))
        return model(x).square().mean()

    x = torch.arange(1.0, 9.0)[:, None].expand(8, 5)
    TrainStep(model, SAM(model.parameters(), lr=0.1), loss, **options)(x, {"samples": samples})


@pytest.mark.parametrize("options", PARTS)
def test_arrays_are_cut_as_tensors_are(options: dict[str, Any]) -> None:
    model = nn.Linear(5, 1)

    def loss(model: nn.Module, x: torch.Tensor, indices: Any, number: Any) -> torch.Tensor:
        assert indices.tolist() == x[:, 0].tolist()
        assert number == 8
        return model(x).square().mean()

    x, indices = torch.arange(8.0)[:, None].expand(8, 5), numpy.arange(8)
    TrainStep(model, SAM(model.parameters(), lr=0.1), loss, **options)(x, indices, numpy.int64(8))


@pytest.mark.parametrize("options", PARTS)
def test_a_list_is_of_tensors_with_all_rows_where_it_has_as_many_items_by_chance(options: dict[str, Any]) -> None:
    model, seen = nn.Linear(5, 1), set()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        x, y, weights = batch
        seen.add((len(x), len(y), len(weights)))
        return model(x).square().mean()

    x = torch.randn(3, 5)
    TrainStep(model, SAM(model.parameters(), lr=0.1), loss, **options)([x, torch.zeros(3), torch.ones(10)])
    assert seen == ({(1, 1, 10), (3, 3, 10)} if "ascent" in options else {(1, 1, 10)})


def test_what_may_be_either_is_refused_where_it_has_to_be_cut() -> None:
    model = nn.Linear(5, 1)
    sam = SAM(model.parameters(), lr=0.1)
    batch = torch.randn(2, 5), [torch.ones(2, 4), torch.ones(2, 4)]
    with pytest.raises(TypeError, match="either may be the samples"):
        TrainStep(model, sam, lambda model, x, views: model(x).mean(), micro_batches=2)(*batch)
    TrainStep(model, sam, lambda model, x, views: model(x).mean())(*batch)


def test_samples_of_a_shard_are_its_own() -> None:
    """m-sharpness."""
    model, lengths = nn.Linear(5, 1), []

    def loss(model: nn.Module, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        lengths.append((len(x), len(names)))
        return model(x).square().mean()

    rho_sharpness(model, loss, [(torch.randn(5, 5), list("abcde"))], rho=0.1, m=2)
    assert lengths == [(2, 2)] * 4 + [(1, 1)] * 2
