"""What SAM costs with fewer passes: whole iterations over SGD's, and the optimizer's own part of a step that does not
perturb.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sam_fast
from bench.clock import WITH_LAUNCHES
from bench.harness import Bench, Contender, Plan, make_params
from bench.networks import NETWORKS
from bench.shapes import SHAPES
from bench.test_training import SGD, SGD_ONCE, sgd_iteration

if not hasattr(sam_fast, "TrainStep"):  # bench.compare measures older versions too
    pytest.skip("this sam_fast has no schedules", allow_module_level=True)
from sam_fast import SAM, Schedule, TrainStep, norm_layers_only

CYCLE = 4
"""Iterations that are timed together: one of them perturbs under ``Schedule(every=4)``."""

Params = Callable[[nn.Module], Iterable[Any]]
CHEAPER: dict[str, tuple[Params, dict[str, Any], dict[str, Any]]] = {
    "sam_fast": (nn.Module.parameters, {}, {}),
    "ascent=1/4": (nn.Module.parameters, {}, {"ascent": 0.25}),
    "every=4": (nn.Module.parameters, {"schedule": Schedule(every=CYCLE)}, {}),
    "norm layers only": (norm_layers_only, {}, {}),
}
"""Name -> what makes the parameters or groups, options of SAM, options of TrainStep."""

PRICE, UNPERTURBED = "iteration, fewer passes", "unperturbed step"


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(x), y)


def cycle(iteration: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CYCLE):
            iteration()

    return run


@pytest.mark.parametrize("name", NETWORKS)
def test_iteration_with_fewer_passes(bench: Bench, name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.make().to(bench.device)
    x, y = (t.to(bench.device) for t in network.batch())
    contenders = {}
    for contender, (params_of, options, step_options) in CHEAPER.items():
        trained = copy.deepcopy(model)
        step = TrainStep(trained, SAM(params_of(trained), **SGD, **options), loss_of, **step_options)
        contenders[contender] = Contender(cycle(lambda step=step: step(x, y)), head_start=WITH_LAUNCHES)
    contenders[SGD_ONCE] = Contender(cycle(sgd_iteration(copy.deepcopy(model), x, y, fused=True)))
    contenders[SGD_ONCE].head_start = WITH_LAUNCHES
    bench.run(
        PRICE,
        name,
        contenders,
        elements=sum(p.numel() for p in model.parameters()),
        plan=Plan(seconds=8.0, rounds=(3, 25)),
        settings={SGD_ONCE: f"torch.optim.SGD(fused=True), {CYCLE} iterations, as all"},
    )


@pytest.mark.parametrize("shapes", ["resnet18", "resnet50"])
def test_unperturbed_step(bench: Bench, shapes: str) -> None:
    """first_step and second_step of a step that does not perturb, against the base optimizer alone."""
    never = Schedule(start=10**9)
    by_name: dict[str, Any] = {
        "sam_fast": lambda params: SAM(params, **SGD, schedule=never),
        SGD_ONCE: lambda params: torch.optim.SGD(params, **SGD, fused=True),
    }
    contenders = {}
    for name, make in by_name.items():
        params = make_params(SHAPES[shapes], device=bench.device)
        grads = [torch.randn_like(p) for p in params]
        optimizer = make(params)

        def prepare(params: Any = params, grads: Any = grads) -> None:
            for p, g in zip(params, grads, strict=True):
                p.grad = g

        def run(optimizer: Any = optimizer) -> None:
            if isinstance(optimizer, SAM):
                optimizer.first_step()
            optimizer.step()

        contenders[name] = Contender(run, prepare)
    bench.run(
        UNPERTURBED,
        shapes,
        contenders,
        elements=sum(p.numel() for p in params),
        settings={SGD_ONCE: "torch.optim.SGD(fused=True)"},
    )
