"""Whole training iterations on real networks: what SAM costs over SGD, whose two iterations have the same forward and
backward passes; and what it costs with fewer passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sam_fast
from bench.harness import Bench, Case, Contender
from bench.models import NETWORKS, SHAPES
from bench.problem import Problem, backward, copies, make_params, params_of
from bench.timers import WITH_LAUNCHES, Work
from sam_fast import SAM, disable_running_stats, enable_running_stats
from sam_fast.reference import ReferenceSAM

SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
SGD_ONCE, SGD_TWICE, REFERENCE = "SGD", "2 x SGD", "SAM reference"
ITERATION, PRICE, UNPERTURBED = "training iteration", "iteration, fewer passes", "unperturbed step"
CYCLE = 4
"""One of so many iterations perturbs under ``Schedule(every=4)``."""
ASCENT, EVERY = "ascent=1/4", f"every={CYCLE}"


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Work:
    optimizer = torch.optim.SGD(model.parameters(), **SGD, fused=True)

    def iteration() -> None:
        loss(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return iteration


def perturbed(model: nn.Module, x: Tensor, y: Tensor, sam: Any = SAM) -> Work:
    """The loop that runs with every SAM implementation."""
    optimizer = sam(model.parameters(), torch.optim.SGD, **SGD)

    def iteration() -> None:
        loss(model, x, y).backward()
        optimizer.first_step(zero_grad=True)
        disable_running_stats(model)
        loss(model, x, y).backward()
        optimizer.second_step(zero_grad=True)
        enable_running_stats(model)

    return iteration


def scheduled(
    model: nn.Module, x: Tensor, y: Tensor, chosen: Any = nn.Module.parameters, schedule: Any = None, **options: Any
) -> Work:
    """SAM on chosen parameters; ``options`` are TrainStep's."""
    return partial(sam_fast.TrainStep(model, SAM(chosen(model), **SGD, schedule=schedule), loss, **options), x, y)


PLAIN = "torch.optim.SGD(fused=True)"
CONTENDERS: dict[str, dict[str, tuple[Callable[..., Work], int, str]]] = {
    ITERATION: {
        "sam_fast": (perturbed, 1, ""),
        SGD_ONCE: (plain, 1, PLAIN),
        SGD_TWICE: (plain, 2, "two iterations of the same"),
        REFERENCE: (partial(perturbed, sam=ReferenceSAM), 1, "sam_fast/reference.py, SGD's defaults"),
    },
    PRICE: {
        "sam_fast": (scheduled, CYCLE, ""),
        ASCENT: (partial(scheduled, ascent=0.25), CYCLE, ""),
        EVERY: (partial(scheduled, schedule=sam_fast.Schedule(every=CYCLE)), CYCLE, ""),
        "norm layers only": (partial(scheduled, chosen=sam_fast.norm_layers_only), CYCLE, ""),
        SGD_ONCE: (plain, CYCLE, f"{PLAIN}, {CYCLE} iterations, as all"),
    },
}
"""By group and name: what makes an iteration, how many are timed together, and the settings."""


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


def iteration(bench: Bench, case: Case) -> None:
    torch.manual_seed(0)
    make, batch = NETWORKS[case.name]
    x, y = (t.to(bench.device) for t in batch())
    few = 8 if bench.smoke and len(x) > 8 else None
    model, x, y = make().to(bench.device), x[:few], y[:few]
    if case.id not in bench.checked:
        check(model, x, y)

    def repeat(run: Work, times: int) -> None:
        for _ in range(times):
            run()

    contenders = {}
    for name, (make_iteration, times, settings) in CONTENDERS[case.group].items():
        runs = partial(repeat, make_iteration(copy.deepcopy(model), x, y), times)
        contenders[name] = Contender({"": runs}, head_start=WITH_LAUNCHES, settings=settings)
    bench.run(case, contenders, weights(model).numel())


def unperturbed(bench: Bench, case: Case) -> None:
    """first_step and second_step of a step that does not perturb, against the base optimizer alone."""
    problem = Problem(make_params(SHAPES[case.name], device=bench.device))
    ours = SAM(copies(problem.start), **SGD, schedule=sam_fast.Schedule(start=10**9))
    base = torch.optim.SGD(copies(problem.start), **SGD, fused=True)
    runs = {"sam_fast": (ours, lambda: (ours.first_step(), ours.step())), SGD_ONCE: (base, base.step)}
    contenders, results = {}, []
    for name, (optimizer, run) in runs.items():
        params = params_of(optimizer)
        make_gradients = backward(params, problem.gradients)
        make_gradients()
        run()
        results.append(nn.utils.parameters_to_vector(params).detach())
        optimizer.zero_grad()
        settings = PLAIN if optimizer is base else ""
        contenders[name] = Contender({"": run}, make_gradients, optimizer.zero_grad, settings=settings)
    torch.testing.assert_close(*results)
    bench.run(case, contenders, problem.elements)
