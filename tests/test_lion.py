"""Lion's fused step: the bits, the state and the counters of the two packages that have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_params, same_bits, values
from fused_runs import run, two_groups, without

lion_pytorch = pytest.importorskip("lion_pytorch")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

LION, INTERPOLATED = lion_pytorch.Lion, pytorch_optimizer.Lion
CASES: list[tuple[Any, dict[str, Any]]] = [
    (LION, {}),
    (LION, {"weight_decay": 0.1, "betas": (0.95, 0.98)}),
    (LION, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (INTERPOLATED, {}),
    (INTERPOLATED, {"weight_decay": 0.1, "betas": (0.4, 0.98)}),
    (INTERPOLATED, {"weight_decay": 0.1, "weight_decouple": False, "maximize": True}),
    (INTERPOLATED, {"weight_decay": 0.1, "fixed_decay": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("base", "options"), CASES)
def test_twenty_steps_have_the_bits_and_the_state_of_the_class(backend, base, options, dtype):
    sizes = [5, 0, 17, 4003]
    params, twin = make_params(sizes, dtype), make_params(sizes, dtype)
    optimizer = two_groups(params, base, backend=backend, **options)
    oracle = without(two_groups(twin, base, backend=backend, **options))
    for each, own in ((optimizer, params), (oracle, twin)):
        run(each, own, 20)
    assert optimizer.second_step_path == "fused"
    assert oracle.second_step_path != "fused"
    assert same_bits(values(params), values(twin))
    for p, q in zip(params, twin, strict=True):
        assert optimizer.state[p].keys() == oracle.state[q].keys()
        assert same_bits(list(optimizer.state[p].values()), list(oracle.state[q].values()))
    counts = [[group.get("step") for group in each.param_groups] for each in (optimizer, oracle)]
    assert counts[0] == counts[1] == [20 if base is INTERPOLATED else None] * 2


@pytest.mark.parametrize("option", ["use_gc", "adanorm", "cautious"])
def test_what_is_another_step_is_taken_by_the_class(backend, option):
    params = make_params([7, 30])
    optimizer = two_groups(params, INTERPOLATED, backend=backend, **{option: True})
    optimizer.first_step()
    optimizer.second_step()
    assert optimizer.second_step_path == f"Lion with {option}=True"
