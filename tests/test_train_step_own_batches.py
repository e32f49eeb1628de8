"""What a pass may do to its batch, and what the other pass of TrainStep then finds."""

from __future__ import annotations

import sys
import warnings
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_train_step_batches import PARTS, Encoding
from torch import nn

from sam_fast import SAM, TrainStep
from sam_fast.batches import with_own_containers
from sam_fast.sharpness import hessian_trace, rho_sharpness

Pair = namedtuple("Pair", "inputs targets")


class Graph:
    """As those of PyTorch Geometric: attributes, and how it is copied."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __copy__(self) -> Graph:
        return Graph(self.x, self.y)


@dataclass
class Record:
    x: Any
    y: Any


@dataclass(slots=True)
class Slotted:
    x: Any
    y: Any


@dataclass(frozen=True)
class Frozen:
    parts: Any


@dataclass(slots=True)
class Unset(Slotted):
    later: Any = field(init=False)


@dataclass
class PickledInPart(Record):
    def __post_init__(self) -> None:
        self.lock = object()
        vars(self)["name"] = "no use"

    @property
    def name(self) -> str:
        raise RuntimeError("on rank 0 only")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}


@dataclass(frozen=True)
class Itself(Frozen):
    def __copy__(self) -> Itself:
        return self


def chained(length: int) -> Record:
    record = Record(X, Y)
    for _ in range(length):
        record = Record(X, [Y, record])
    return record


def taken_out(batch: Any) -> Any:
    return batch.pop("x"), batch.pop("y")


def replaced(batch: Any) -> Any:
    batch["x"] = batch["x"] * 2
    return batch["x"] / 2, batch["y"]


def replaced_in_a_list(batch: Any) -> Any:
    batch[0] = batch[0] + 1
    return batch[0] - 1, batch[1]["y"].pop()


def replaced_in_a_tuple(batch: Any) -> Any:
    return batch.inputs.pop(), batch.targets


def replaced_in_an_object(batch: Any) -> Any:
    batch.x = batch.x * 2
    return batch.x / 2, batch.y


def replaced_within_a_frozen_one(batch: Any) -> Any:
    return batch.parts.pop(), replaced_in_an_object(batch.parts[0])[1]


X, Y = torch.randn(8, 5), torch.randn(8, 1)
CHANGES: list[tuple[Callable[[Any], Any], Callable[[], Any]]] = [
    (taken_out, lambda: {"x": X, "y": Y}),
    (replaced, lambda: Encoding({"x": X, "y": Y})),
    (replaced_in_a_list, lambda: [X, {"y": [Y]}]),
    (replaced_in_a_tuple, lambda: Pair([X], Y)),
    (replaced_in_an_object, lambda: Graph(X, Y)),
    (replaced_in_an_object, lambda: Record(X, Y)),
    (replaced_in_an_object, lambda: Slotted(X, Y)),
    (replaced_in_an_object, lambda: SimpleNamespace(x=X, y=Y)),
    (replaced_within_a_frozen_one, lambda: Frozen([Record(X, Y), X])),
]


@pytest.mark.parametrize(("change", "make"), CHANGES)
def test_what_a_pass_takes_out_or_replaces_the_other_still_finds(change: Any, make: Any) -> None:
    model, seen = nn.Linear(5, 1), []

    def loss(model: nn.Module, *batch: Any) -> torch.Tensor:
        x, y = change(batch[0])
        seen.append((x, y))
        return (model(x) - y).square().mean()

    step = TrainStep(model, SAM(model.parameters(), lr=0.1), loss)
    batch, rows = make(), [] if isinstance(make(), (tuple, list, dict, UserDict)) else [X]
    step(batch, *rows)
    twice = [(batch, *rows) for batch in (make(), make())]
    rho_sharpness(model, loss, twice, rho=0.1)
    hessian_trace(model, loss, twice, samples=2)
    assert len(seen) == 2 + 4 + 2
    for x, y in seen:
        torch.testing.assert_close((x, y), (X, Y))


class ReadOnly(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("read-only")


class Uncopyable(dict[str, Any]):
    def __copy__(self) -> Uncopyable:
        raise TypeError("there is one of these")


class OfTwo(tuple[Any, ...]):
    """A tuple that is not made of an iterable."""

    def __new__(cls, *two: Any) -> OfTwo:
        return super().__new__(cls, two)


def tree() -> dict[str, Any]:
    root: dict[str, Any] = {"x": X, "parent": None}
    root["children"] = [{"x": X, "parent": root, "children": []} for _ in range(3)]
    return root


@pytest.mark.parametrize(
    ("batch", "first"),
    [
        (ReadOnly(x=X, names=["a"]), lambda batch: batch["x"]),
        (Uncopyable(x=X), lambda batch: batch["x"]),
        (OfTwo(X, ["a"]), lambda batch: batch[0]),
        (tree(), lambda batch: batch["children"][0]["parent"]["children"][2]["x"]),
    ],
)
def test_containers_that_cannot_be_made_anew_are_shared_and_a_batch_may_lead_to_itself(batch: Any, first: Any) -> None:
    model, seen = nn.Linear(5, 1), []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(batch)
        return model(first(batch)).square().mean()

    TrainStep(model, SAM(model.parameters(), lr=0.1), loss)(batch)
    assert seen[1] is batch
    assert type(seen[0]) is type(batch)
    if isinstance(batch, tuple):
        assert seen[0] == batch
        assert seen[0][1] is not batch[1]
    if type(batch) is dict:
        assert seen[0] is not batch
        assert seen[0]["children"][0]["parent"] is seen[0]


def test_numbers_in_a_batch_cost_next_to_nothing() -> None:
    """They are many, where texts are lists of tokens, and none of them is looked at by a function of ours."""
    batch, calls = ({"x": X, "tokens": [[1] * 100 for _ in range(10)]},), 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        with_own_containers(batch)
    finally:
        sys.setprofile(None)
    assert calls < 100


@pytest.mark.parametrize("ascent", [1.0, 0.5])
def test_writing_into_the_batch_is_warned_of_once(ascent: float) -> None:
    model = nn.Linear(5, 1)
    writes = TrainStep(
        model, SAM(model.parameters(), lr=0.1), lambda model, x: model(x.mul_(2)).square().mean(), ascent=ascent
    )
    with pytest.warns(RuntimeWarning, match=r"x = x \* 2") as caught:
        writes(X.clone())
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writes(X.clone())
        with torch.inference_mode():
            made_there = X.clone()
        reads = TrainStep(model, SAM(model.parameters(), lr=0.1), lambda model, x, _: model(x).square().mean())
        reads(X.clone(), made_there)


@pytest.mark.parametrize(
    "make", [lambda: Unset(X, Y), lambda: PickledInPart(X, Y), lambda: chained(2000)], ids=["unset", "lock", "chained"]
)
def test_a_record_may_be_of_any_kind(make: Callable[[], Any]) -> None:
    """Slots that are empty, properties that raise, what is not pickled, records that lead to many others."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if isinstance(batch, PickledInPart):
            assert batch.lock is made.lock
        return model(batch.x).square().mean()

    model, made = nn.Linear(5, 1), make()
    TrainStep(model, SAM(model.parameters(), lr=0.1), loss)(made)


def test_a_record_that_says_how_to_be_copied_is_not_written_into() -> None:
    parts = [X]
    batch = Itself(parts)
    model = nn.Linear(5, 1)
    step = TrainStep(model, SAM(model.parameters(), lr=0.1), lambda model, batch: model(batch.parts[0]).mean())
    step(batch)
    assert batch.parts is parts


def test_writing_into_a_record_in_the_batch_is_warned_of() -> None:
    model = nn.Linear(5, 1)
    step = TrainStep(
        model, SAM(model.parameters(), lr=0.1), lambda model, batch: model(batch.x.mul_(2)).square().mean()
    )
    with pytest.warns(RuntimeWarning, match=r"x = x \* 2"):
        step(Slotted(X.clone(), [SimpleNamespace(y=Y)]))


@pytest.mark.parametrize("batch", [(Graph(X, Y),), (), ("a name", 3.0)])
def test_a_batch_that_is_not_cut_may_be_anything(batch: tuple[Any, ...]) -> None:
    """A graph, or nothing at all where a graph is the whole of the data."""

    def loss(model: nn.Module, *given: Any) -> torch.Tensor:
        assert len(given) == len(batch)
        x, y = (given[0].x, given[0].y) if batch and isinstance(given[0], Graph) else (X, Y)
        return (model(x) - y).square().mean()

    models = [nn.Linear(5, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    found = TrainStep(models[0], SAM(models[0].parameters(), lr=0.1), loss)(*batch)
    wanted = TrainStep(models[1], SAM(models[1].parameters(), lr=0.1), lambda model, x, y: loss(model, *batch))(X, Y)
    assert torch.equal(found.loss, wanted.loss)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("options", PARTS)
def test_what_has_no_rows_cannot_be_cut(options: dict[str, Any]) -> None:
    model = nn.Linear(5, 1)
    optimizer = SAM(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no tensor with rows, and ascent below 1 and micro_batches above 1"):
        TrainStep(model, optimizer, lambda model, graph: model(graph.x).mean(), **options)(Graph(X, Y))
    with pytest.raises(ValueError, match="the batch has no rows"):
        TrainStep(model, optimizer, lambda model, x: model(x).mean(), **options)(X[:0])
    assert not optimizer.perturbed
