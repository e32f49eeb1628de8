"""Whole training iterations on real networks: what SAM costs over SGD, whose two iterations have the same forward and
backward passes; and what it costs with fewer passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sam_fast
from bench.harness import Bench, Contender
from bench.models import NETWORKS, SHAPES
from bench.problem import backward, make_params
from bench.timers import WITH_LAUNCHES
from sam_fast import SAM, disable_running_stats, enable_running_stats
from sam_fast.reference import ReferenceSAM

SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
SGD_ONCE, SGD_TWICE, REFERENCE = "SGD", "2 x SGD", "SAM reference"
ITERATION, PRICE, UNPERTURBED = "training iteration", "iteration, fewer passes", "unperturbed step"
SETTINGS = {
    SGD_ONCE: "torch.optim.SGD(fused=True)",
    SGD_TWICE: "two iterations of the same",
    REFERENCE: "sam_fast/reference.py, SGD's defaults",
}
CYCLE = 4
"""Iterations that are timed together: one of them perturbs under ``Schedule(every=4)``."""
ASCENT, EVERY = "ascent=1/4", f"every={CYCLE}"


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


def check(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One iteration in float32 must move the weights as the reference does in float64."""
    oracle, tested = copy.deepcopy(model).double(), copy.deepcopy(model)
    perturbed(oracle, x.double() if x.is_floating_point() else x, y, ReferenceSAM)()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32, as what it is compared with
        perturbed(tested, x, y)()
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


def as_a_loop_waits(runs: dict[str, Callable[[], None]]) -> dict[str, Contender]:
    return {name: Contender(run, head_start=WITH_LAUNCHES) for name, run in runs.items()}


def iteration(bench: Bench, group: str, name: str) -> None:
    model, x, y = network(bench, name)
    if bench.unchecked():
        check(model, x, y)
    runs = {
        "sam_fast": perturbed(copy.deepcopy(model), x, y),
        SGD_ONCE: plain(copy.deepcopy(model), x, y),
        SGD_TWICE: plain(copy.deepcopy(model), x, y, 2),
        REFERENCE: perturbed(copy.deepcopy(model), x, y, ReferenceSAM),
    }
    elements = weights(model).numel()
    bench.run(group, name, as_a_loop_waits(runs), elements=elements, seconds=2.0, rounds=(4, 60), settings=SETTINGS)


def fewer_passes(bench: Bench, group: str, name: str) -> None:
    model, x, y = network(bench, name)

    def cycle(norm_layers: bool = False, schedule: Any = None, **options: Any) -> Callable[[], None]:
        trained = copy.deepcopy(model)
        params = sam_fast.norm_layers_only(trained) if norm_layers else trained.parameters()
        optimizer = SAM(params, **SGD, schedule=schedule)
        step = sam_fast.TrainStep(trained, optimizer, lambda m, x, y: cross_entropy(m(x), y), **options)

        def iterations() -> None:
            for _ in range(CYCLE):
                step(x, y)

        return iterations

    runs = {
        "sam_fast": cycle(),
        ASCENT: cycle(ascent=0.25),
        EVERY: cycle(schedule=sam_fast.Schedule(every=CYCLE)),
        "norm layers only": cycle(norm_layers=True),
        SGD_ONCE: plain(copy.deepcopy(model), x, y, CYCLE),
    }
    settings = {SGD_ONCE: f"{SETTINGS[SGD_ONCE]}, {CYCLE} iterations, as all"}
    elements = weights(model).numel()
    bench.run(group, name, as_a_loop_waits(runs), elements=elements, seconds=8.0, rounds=(8, 20), settings=settings)


def unperturbed(bench: Bench, group: str, name: str) -> None:
    """first_step and second_step of a step that does not perturb, against the base optimizer alone."""
    contenders, results = {}, []
    for contender in ("sam_fast", SGD_ONCE):
        params = make_params(SHAPES[name], device=bench.device)
        make_gradients = backward(params, [p.grad.clone() for p in params if p.grad is not None])
        if contender == SGD_ONCE:
            optimizer: Any = torch.optim.SGD(params, **SGD, fused=True)
            run = optimizer.step
        else:
            optimizer = SAM(params, **SGD, schedule=sam_fast.Schedule(start=10**9))
            run = lambda optimizer=optimizer: (optimizer.first_step(), optimizer.step())  # noqa: E731
        run()
        results.append(torch.cat([p.detach().reshape(-1) for p in params]))
        optimizer.zero_grad()
        contenders[contender] = Contender(run, make_gradients, optimizer.zero_grad)
    torch.testing.assert_close(*results)
    bench.run(group, name, contenders, elements=results[0].numel(), settings={SGD_ONCE: SETTINGS[SGD_ONCE]})
