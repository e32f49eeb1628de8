"""The address tables: what the native kernels are told, and the Python twin of the native gatherer."""

from __future__ import annotations

from array import array

import pytest
import torch
from cases import make_params

from sam_fast.backends import addresses


def gatherers(rows):
    """The native gatherer, where it was built, and the Python one."""
    native = [] if addresses._cpu is None else [addresses.make_gather(rows)]
    return [*native, addresses.PythonGather(rows)]


def odd_gradients():
    params = make_params([5, 0, 1, 12, 12, 12, 12, 7])
    params[3].data, params[3].grad = params[3].data.view(3, 4), torch.ones(4, 3).t()
    params[4].grad = None
    params[5].grad = torch.ones(24)[::2]
    params[6].data, params[6].grad = params[6].data.view(1, 12), torch.ones(12, 1).t()  # strides (1, 1), not (12, 1): the same memory
    return params


@pytest.mark.parametrize("which", [0, 1], ids=["native", "python"])
def test_gradients_addresses_and_those_that_need_a_copy(which):
    params = odd_gradients()
    params[7].data = torch.ones(14)[::2]
    found = gatherers(params)
    if which >= len(found):
        pytest.skip("the native module was not built")
    table = array("Q", bytes(8 * len(params)))
    assert found[which].grads(table) == [3, 5, 7]
    assert list(table) == [params[0].grad.data_ptr(), 0, params[2].grad.data_ptr(), 0, 0, 0, params[6].grad.data_ptr(), 0]
    assert found[which].weights(table) == []
    assert list(table) == [p.data_ptr() if p.numel() else 0 for p in params]


@pytest.mark.parametrize("change", ["dtype", "shape", "strides", "sparse"])
def test_a_changed_row_has_no_address(change):
    params = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(2))]
    found = gatherers(params)
    new = {"dtype": torch.ones(3, 4).double(), "shape": torch.ones(4, 4), "strides": torch.ones(4, 3).t(), "sparse": torch.ones(3, 4).to_sparse()}[
        change
    ]
    if change == "sparse":
        params[0].grad = new
    else:
        params[0].data = new
    for gather in found:
        table = array("Q", [7, 7])
        assert (gather.grads if change == "sparse" else gather.weights)(table) == [0]
        assert table[0] == 0


def test_the_table_must_have_a_place_for_every_row():
    if addresses._cpu is None:
        pytest.skip("the native module was not built")
    gather = addresses.make_gather(make_params([3, 4]))
    with pytest.raises(ValueError, match="2 rows"):
        gather.weights(array("Q", bytes(8)))
    with pytest.raises(BufferError):
        gather.weights(bytes(16))


def test_without_native_modules_the_python_gatherer_is_used(monkeypatch):
    monkeypatch.setattr(addresses, "_cpu", None)
    assert isinstance(addresses.make_gather(make_params([3])), addresses.PythonGather)
