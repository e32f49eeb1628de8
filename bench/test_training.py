"""Whole training iterations on real networks: what SAM costs over SGD, whose two iterations have the same forward and
backward passes; and what it costs with fewer passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sam_fast
from bench.harness import Bench, Contender, Plan
from bench.models import NETWORKS, SHAPES
from bench.problem import backward, make_params
from bench.timers import WITH_LAUNCHES
from sam_fast import SAM, disable_running_stats, enable_running_stats
from sam_fast.reference import ReferenceSAM

SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
SGD_ONCE, SGD_TWICE, REFERENCE = "SGD", "2 x SGD", "SAM reference"
GRAPH = "sam_fast, CUDA graph"
ITERATION, PRICE, UNPERTURBED = "training iteration", "iteration, fewer passes", "unperturbed step"
SETTINGS = {SGD_ONCE: "torch.optim.SGD(fused=True)", SGD_TWICE: "two iterations of the same"}
CYCLE = 4
"""Iterations that are timed together: one of them perturbs under ``Schedule(every=4)``."""
ASCENT, EVERY = "ascent=1/4", f"every={CYCLE}"
needs_schedules = pytest.mark.skipif(not hasattr(sam_fast, "TrainStep"), reason="this sam_fast has no schedules")


def plain(model: nn.Module, x: Tensor, y: Tensor, times: int = 1) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), **SGD, fused=True)

    def iterations() -> None:
        for _ in range(times):
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    return iterations


def perturbed(model: nn.Module, x: Tensor, y: Tensor, sam: Any = SAM) -> Callable[[], None]:
    """The loop that runs with every SAM implementation."""
    optimizer = sam(model.parameters(), torch.optim.SGD, **SGD)

    def iteration() -> None:
        cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        disable_running_stats(model)
        cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        enable_running_stats(model)

    return iteration


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


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
    before = weights(model)
    graph.replay()
    moved = float((weights(model) - before).norm())
    assert 0 < moved < float("inf"), "the graph takes no step, so it is not timed"
    return graph.replay


def check(model: nn.Module, x: Tensor, y: Tensor, sam: Any = SAM) -> None:
    """One iteration in float32 must move the weights as the reference does in float64."""
    oracle, tested = copy.deepcopy(model).double(), copy.deepcopy(model)
    perturbed(oracle, x.double() if x.is_floating_point() else x, y, ReferenceSAM)()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32, as what it is compared with
        perturbed(tested, x, y, sam)()
    want, got = weights(oracle) - weights(model), weights(tested) - weights(model)
    # Both the passes and the weights are rounded to float32: an update of lr times a gradient loses some thousandths of
    # its length.
    error = float((got - want).norm() / want.norm())
    assert error < 0.02, f"the update is off by {error:.3g} of its length, so it is not timed"
    for a, b in zip(tested.buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def network(bench: Bench, name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, batch = NETWORKS[name]
    x, y = (t.to(bench.device) for t in batch())
    few = 8 if bench.smoke and len(x) > 8 else None
    return make().to(bench.device), x[:few], y[:few]


@pytest.mark.parametrize("name", NETWORKS)
def test_training_iteration(bench: Bench, name: str) -> None:
    model, x, y = network(bench, name)
    if bench.case not in bench.checked:
        check(model, x, y)
    models = [copy.deepcopy(model) for _ in range(5)]
    runs = {
        "sam_fast": perturbed(models[0], x, y),
        SGD_ONCE: plain(models[1], x, y),
        SGD_TWICE: plain(models[2], x, y, 2),
    }
    runs[REFERENCE] = perturbed(models[3], x, y, ReferenceSAM)
    if bench.device == "cuda":
        runs[GRAPH] = captured(models[4], perturbed(models[4], x, y))
    bench.run(
        ITERATION,
        name,
        {n: Contender(run, head_start=WITH_LAUNCHES) for n, run in runs.items()},  # as a loop waits for it
        elements=weights(model).numel(),
        plan=Plan(seconds=1.5, rounds=(3, 15)),
        settings={**SETTINGS, REFERENCE: "sam_fast/reference.py, SGD's defaults"},
    )


def cheaper(trained: nn.Module) -> dict[str, tuple[Iterable[Any], dict[str, Any], dict[str, Any]]]:
    """Name -> parameters or groups, options of SAM, options of TrainStep."""
    every = sam_fast.Schedule(every=CYCLE)
    return {
        "sam_fast": (trained.parameters(), {}, {}),
        ASCENT: (trained.parameters(), {}, {"ascent": 0.25}),
        EVERY: (trained.parameters(), {"schedule": every}, {}),
        "norm layers only": (sam_fast.norm_layers_only(trained), {}, {}),
    }


@needs_schedules
@pytest.mark.once
@pytest.mark.parametrize("name", [n if "ConvNet" in n else pytest.param(n, marks=pytest.mark.full) for n in NETWORKS])
def test_iteration_with_fewer_passes(bench: Bench, name: str) -> None:
    model, x, y = network(bench, name)
    contenders = {}
    for contender in cheaper(model):
        trained = copy.deepcopy(model)
        params, options, step_options = cheaper(trained)[contender]
        optimizer = SAM(params, **SGD, **options)
        step = sam_fast.TrainStep(trained, optimizer, lambda m, x, y: cross_entropy(m(x), y), **step_options)

        def cycle(step: Any = step) -> None:
            for _ in range(CYCLE):
                step(x, y)

        contenders[contender] = Contender(cycle, head_start=WITH_LAUNCHES)
    contenders[SGD_ONCE] = Contender(plain(copy.deepcopy(model), x, y, CYCLE), head_start=WITH_LAUNCHES)
    settings = {SGD_ONCE: f"{SETTINGS[SGD_ONCE]}, {CYCLE} iterations, as all"}
    plan = Plan(seconds=6.0, rounds=(5, 15))
    bench.run(PRICE, name, contenders, elements=weights(model).numel(), plan=plan, settings=settings)


@needs_schedules
@pytest.mark.parametrize("shapes", ["resnet18", "resnet50"])
def test_unperturbed_step(bench: Bench, shapes: str) -> None:
    """first_step and second_step of a step that does not perturb, against the base optimizer alone."""
    contenders, results = {}, []
    for name in ("sam_fast", SGD_ONCE):
        params = make_params(SHAPES[shapes], device=bench.device)
        make_gradients = backward(params, [p.grad.clone() for p in params if p.grad is not None])
        never = {"schedule": sam_fast.Schedule(start=10**9)}
        optimizer: Any = SAM(params, **SGD, **never) if name != SGD_ONCE else torch.optim.SGD(params, **SGD, fused=True)

        def both(optimizer: Any = optimizer) -> None:
            optimizer.first_step()
            optimizer.step()

        run = optimizer.step if name == SGD_ONCE else both
        run()
        results.append(torch.cat([p.detach().reshape(-1) for p in params]))
        optimizer.zero_grad()
        contenders[name] = Contender(run, make_gradients, optimizer.zero_grad)
    torch.testing.assert_close(*results)
    bench.run(UNPERTURBED, shapes, contenders, elements=results[0].numel(), settings=SETTINGS)
