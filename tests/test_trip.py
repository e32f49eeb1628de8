"""The trip of one step: how many named functions of the package are called, and how often a call changes the file.

``python tests/test_trip.py`` prints the numbers. They are for the cpu backend, once the base optimizer has its state.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import sam_fast
from sam_fast import SAM, backends

PACKAGE = os.path.dirname(sam_fast.__file__)

pytestmark = pytest.mark.skipif("cpu" not in backends.available(), reason="the cpu backend was not built")


def trip(call: Callable[[], Any]) -> tuple[int, int]:
    """How many named calls ``call`` makes inside the package, and how many of them go into another file."""
    calls = changes = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls, changes
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<"):
            return
        calls += 1
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        changes += caller is not None and caller.f_code.co_filename != code.co_filename

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls, changes


def trips(base: Any, make: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Those of both steps of a small model, as soon as they are like all later ones."""
    gc.collect()  # a step asks the optimizers of other tests, too
    params = [nn.Parameter(make(torch.randn(8))) for _ in range(5)]
    optimizer = SAM(params, base, lr=0.1, backend="cpu")

    def step() -> dict[str, tuple[int, int]]:
        found = {}
        for name in ("first_step", "second_step"):
            for p in params:
                p.grad = make(torch.ones(8))
            found[name] = trip(getattr(optimizer, name))
        return found

    step()
    step()
    return step()


LIMITS = {torch.optim.SGD: (21, 12), torch.optim.AdamW: (23, 12)}
"""Of second_step."""


@pytest.mark.parametrize("base", LIMITS)
def test_the_trip_of_a_step_is_short(base: Any) -> None:
    found = trips(base, lambda tensor: tensor)
    (first_calls, first_changes), (calls, changes) = found["first_step"], found["second_step"]
    assert first_calls <= 22
    assert first_changes <= 11
    assert calls <= LIMITS[base][0]
    assert changes <= LIMITS[base][1]


def test_a_scheduler_does_not_make_it_longer() -> None:
    params = [nn.Parameter(torch.randn(8)) for _ in range(5)]
    optimizer = SAM(params, lr=0.1, backend="cpu")
    torch.optim.lr_scheduler.StepLR(optimizer, 100)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(8)
        optimizer.first_step()
        calls, _ = trip(optimizer.second_step)
    assert calls <= LIMITS[torch.optim.SGD][0] + 1


def test_a_step_of_dtensors_calls_nothing_for_each_of_them(tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        found = trips(torch.optim.AdamW, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
        calls, changes = found["second_step"]
        assert calls <= 24
        assert changes <= 13
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    for of in LIMITS:
        for name, (calls, changes) in trips(of, lambda tensor: tensor).items():
            print(f"{of.__name__}, {name}: {calls} calls, {changes} changes of file")
