"""Columns: what the native gatherer and its Python twin read, and what they refuse."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from cases import make_params
from torch import Tensor

from sam_fast.backends import columns
from sam_fast.backends.columns import DEVICE_FLOAT32, HOST_FLOAT32, HOST_FLOAT64, NO_COUNTERS, PythonGather, column


@pytest.fixture(params=["native", "python"])
def gather(request: pytest.FixtureRequest) -> Any:
    """Makes a gatherer of tensors that are their own parameters."""
    if request.param == "native" and columns._cpu is None:
        pytest.skip("the native module was not built")

    def make(tensors: list[Tensor], groups: list[int] | None = None) -> Any:
        maker = columns.make_gather if request.param == "native" else PythonGather
        return maker(tensors, tensors, groups or [0] * len(tensors))

    return make


def address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else 0


def odd_gradients() -> list[Any]:
    params = make_params([5, 0, 1, 12, 12, 12, 12, 7])
    params[3].data, params[3].grad = params[3].data.view(3, 4), torch.ones(4, 3).t()
    params[4].grad = None
    params[5].grad = torch.ones(24)[::2]
    params[6].data = params[6].data.view(1, 12)
    params[6].grad = torch.ones(12, 1).t()  # strides (1, 1), not (12, 1): the same memory
    params[7].data = torch.ones(14)[::2]
    return params


def test_gradients_and_those_that_need_a_copy(gather: Any) -> None:
    params = odd_gradients()
    found, table = gather(params), column(len(params))
    weights = column(len(params))
    assert found.collect(weights, table, None) == ([], [3, 5, 7])
    grads = [p.grad for p in params]
    assert list(table) == [address(grads[0]), 0, address(grads[2]), 0, 0, 0, address(grads[6]), 0]
    assert found.num_grads == 7
    assert found.has_grad == bytes([1, 1, 1, 1, 0, 1, 1, 1])
    assert list(weights) == [address(p) for p in params]
    assert found.weights(table) == []
    assert table == weights


def test_gradients_of_groups_that_are_not_wanted_are_not_looked_at(gather: Any) -> None:
    params = make_params([5, 3, 4])
    found, table = gather(params, [0, 1, 2]), column(3)
    params[1].grad = torch.ones(3).to_sparse()
    assert found.collect(column(3), table, bytes([1, 0, 1])) == ([], [])
    assert list(table) == [address(params[0].grad), 0, address(params[2].grad)]
    assert found.num_grads == 2


def test_a_direction_is_any_list_of_tensors(gather: Any) -> None:
    params = make_params([5, 0, 3, 4])
    along = [torch.ones(5), torch.ones(0), None, torch.ones(4).double()]
    found, table = gather(params), array("Q", [7] * 4)
    assert found.read(along, table) == [3]
    assert list(table) == [address(along[0]), 0, 0, 0]
    with pytest.raises(ValueError, match="each of 4"):
        found.read(along[:3], table)


@pytest.mark.guarantee(id="wrong-arguments")
@pytest.mark.parametrize("change", ["dtype", "shape", "strides", "sparse", "negated"])
def test_a_changed_tensor_has_no_address(gather: Any, change: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(2))]
    found, table = gather(params), array("Q", [7, 7])
    new = {
        "dtype": torch.ones(3, 4).double(),
        "shape": torch.ones(4, 4),
        "strides": torch.ones(4, 3).t(),
        "sparse": torch.ones(3, 4).to_sparse(),
        "negated": torch._neg_view(torch.ones(3, 4)),
    }[change]
    if change == "sparse":
        params[0].grad = new
        assert found.collect(array("Q", [7, 7]), table, None) == ([], [0])
    else:
        params[0].data = new
        assert found.weights(table) == [0]
    assert table[0] == 0


# ---- The base optimizer's state --------------------------------------------------------------------------------------


NAMES = ("first", "second")


def state_of(params: list[Any]) -> dict[Any, dict[str, Tensor]]:
    return {p: {name: torch.ones_like(p) for name in NAMES} for p in params}


def read(found: Any, state: Any, masks: list[int], columns: Any = None) -> tuple[Any, list[list[int]]]:
    table = column(len(found.has_grad))
    found.collect(column(len(table)), table, None)
    columns = tuple(column(len(table)) for _ in NAMES)
    return found.states(state, NAMES, array("Q", masks), columns), [list(of_name) for of_name in columns]


def test_states_of_those_that_have_a_gradient_and_whose_group_has_the_state(gather: Any) -> None:
    params = make_params([5, 0, 3, 4])
    params[2].grad = None
    state = state_of(params)
    found = gather(params, [0, 0, 1, 1])
    for _ in range(2):  # the second time the order of the state's keys is known
        wrong, (first, second) = read(found, state, [3, 1])
        assert wrong is None
        assert first == [address(state[params[0]]["first"]), 0, 0, address(state[params[3]]["first"])]
        assert second == [address(state[params[0]]["second"]), 0, 0, 0]
    other = torch.ones(1)
    reordered = {other: {}, **{p: state[p] for p in reversed(params)}}
    assert read(found, reordered, [3, 1]) == (None, [first, second])


def test_what_is_missing_or_odd_is_named(gather: Any) -> None:
    params = make_params([5, 6, 4])
    found, state = gather(params), state_of(params)
    del state[params[1]]["second"]
    assert read(found, state, [3])[0] == (True, 1, 1)
    assert read(found, state, [1])[0] is None
    state[params[1]]["second"] = torch.ones(7)
    assert read(found, state, [3])[0] == (False, 1, 1)
    del state[params[1]]
    assert read(found, state, [3])[0] == (True, 1, 0)
    params[1].grad = None
    assert read(found, state, [3])[0] is None


@pytest.mark.parametrize(
    ("counters", "kind"),
    [
        ([torch.tensor(3.0), torch.tensor([4.0])], HOST_FLOAT32),
        ([torch.tensor(3.0).double(), torch.tensor(4.0).double()], HOST_FLOAT64),
        ([torch.tensor(3.0), torch.tensor(4.0).double()], None),
        ([torch.tensor(3), torch.tensor(4)], None),
        ([torch.tensor([3.0, 3.0]), torch.tensor(4.0)], None),
        ([None, torch.tensor(4.0)], "missing"),
    ],
)
def test_counters(gather: Any, counters: list[Any], kind: Any) -> None:
    params = make_params([5, 0])
    found, table = gather(params), column(2)
    found.collect(column(2), table, None)
    state = {p: {} if counter is None else {"step": counter} for p, counter in zip(params, counters, strict=True)}
    wrong, read_counters, found_kind = found.counters(state, "step", 4, array("Q", [4]), table)
    if isinstance(kind, int):
        assert (wrong, found_kind) == (None, kind)
        assert all(a is b for a, b in zip(read_counters, counters, strict=True))
        assert list(table) == [counter.data_ptr() for counter in counters]
    else:
        assert wrong[0] is (kind == "missing")
    assert found.counters(state, "step", 4, array("Q", [0]), table) == (None, [], NO_COUNTERS)
    assert DEVICE_FLOAT32 not in (NO_COUNTERS, HOST_FLOAT32, HOST_FLOAT64)


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_the_table_must_have_a_place_for_every_tensor() -> None:
    if columns._cpu is None:
        pytest.skip("the native module was not built")
    params = make_params([3, 4])
    found = columns.make_gather(params, params, [0, 0])
    with pytest.raises(ValueError, match="of 2"):
        found.weights(array("Q", bytes(8)))
    with pytest.raises(BufferError):
        found.weights(bytes(16))


def test_without_native_modules_the_python_gatherer_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_cpu", None)
    params = make_params([3])
    assert isinstance(columns.make_gather(params, params, [0]), PythonGather)
