"""Whole training iterations on real networks: what SAM costs over SGD, whose two iterations have the same forward and
backward passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.clock import WITH_LAUNCHES
from bench.harness import Bench, Contender, Plan
from bench.networks import NETWORKS
from sam_fast import SAM, disable_running_stats, enable_running_stats
from sam_fast.reference import ReferenceSAM

SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
SGD_ONCE, SGD_TWICE, REFERENCE = "SGD", "2 x SGD", "SAM reference"
GRAPH = "sam_fast, CUDA graph"


def sgd_iteration(model: nn.Module, x: Tensor, y: Tensor, **extra: Any) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), **SGD, **extra)

    def iteration() -> None:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return iteration


def sam_iteration(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Callable[[], None]:
    """The loop that runs with every SAM implementation."""

    def iteration() -> None:
        cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        disable_running_stats(model)
        cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        enable_running_stats(model)

    return iteration


def twice(iteration: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        iteration()
        iteration()

    return both


def captured(model: nn.Module, iteration: Callable[[], None]) -> Callable[[], None]:
    """The iteration as one CUDA graph, after some eager ones that allocate everything."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            iteration()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iteration()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    graph.replay()
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert 0 < float(moved.norm()) < float("inf"), "the graph takes no step, so it is not timed"
    return graph.replay


def check(model: nn.Module, x: Tensor, y: Tensor, make: Callable[[nn.Module], Any]) -> None:
    """One iteration in float32 must move the weights as the reference does in float64."""
    oracle = copy.deepcopy(model).double()
    tested = copy.deepcopy(model)
    inputs = x.double() if x.is_floating_point() else x
    sam_iteration(oracle, ReferenceSAM(oracle.parameters(), torch.optim.SGD, **SGD), inputs, y)()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32, as what it is compared with
        sam_iteration(tested, make(tested), x, y)()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().double()
    want = nn.utils.parameters_to_vector(oracle.parameters()).detach() - start
    got = nn.utils.parameters_to_vector(tested.parameters()).detach().double() - start
    # Both the passes and the weights are rounded to float32: an update of lr times a gradient loses some thousandths of
    # its length.
    error = float((got - want).norm() / want.norm())
    assert error < 0.02, f"the update is off by {error:.3g} of its length, so it is not timed"
    for a, b in zip(tested.buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_training_iteration(bench: Bench, name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.make().to(bench.device)
    x, y = (t.to(bench.device) for t in network.batch())

    def sam(model: nn.Module) -> SAM:
        return SAM(model.parameters(), torch.optim.SGD, **SGD)

    check(model, x, y, sam)
    models = [copy.deepcopy(model) for _ in range(5)]
    once = sgd_iteration(models[0], x, y, fused=True)
    contenders = {
        "sam_fast": Contender(sam_iteration(models[1], sam(models[1]), x, y)),
        SGD_ONCE: Contender(once),
        SGD_TWICE: Contender(twice(sgd_iteration(models[2], x, y, fused=True))),
        REFERENCE: Contender(
            sam_iteration(models[3], ReferenceSAM(models[3].parameters(), torch.optim.SGD, **SGD), x, y)
        ),
    }
    if bench.device == "cuda":
        contenders[GRAPH] = Contender(captured(models[4], sam_iteration(models[4], sam(models[4]), x, y)))
    for contender in contenders.values():
        contender.head_start = WITH_LAUNCHES  # as a loop waits for it
    bench.run(
        "training iteration",
        name,
        contenders,
        elements=sum(p.numel() for p in model.parameters()),
        plan=Plan(seconds=5.0, rounds=(5, 50)),
        settings={
            SGD_ONCE: "torch.optim.SGD(fused=True)",
            SGD_TWICE: "two iterations of the same",
            REFERENCE: "sam_fast/reference.py, SGD's defaults",
        },
    )
