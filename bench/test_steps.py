"""The whole optimizer step, and its two halves: first_step (norm, backup, perturb) and second_step (restore and the
base optimizer); how they grow, and what they take where there is nothing to compute.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from bench import peers
from bench.harness import LARGE, Bench, Plan, steps_of, usable
from bench.models import MODELS, ONE, SHAPES, TINY, elements
from bench.peers import COMPILED, FOREACH, OURS, PEER_FOREACH, PEER_LOOP, PUBLIC_LOOP, REFERENCE, REFERENCE_FUSED
from bench.problem import Problem, make_params
from bench.timers import HOST_ALONE, WITH_LAUNCHES

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], int]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}, 20),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 1e-2}, 28),
}
"""Name -> class, options, and the bytes per float32 element that second_step must move."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ALL = (REFERENCE, REFERENCE_FUSED, PEER_LOOP, PEER_FOREACH, FOREACH)
TARGETS, FEW = (REFERENCE, PEER_LOOP, FOREACH), (REFERENCE, FOREACH)
EVERY_BASELINE = ("resnet18", "resnet50")
"""Shape sets on which the default selection runs all baselines, with SGD; elsewhere those that a target speaks of."""
FULL = {("SGD", ONE), ("AdamW", ONE), ("AdamW", TINY), ("AdamW", "gpt2")}
"""What takes longest and tells least."""


def case(*values: Any, default: bool = True) -> Any:
    return pytest.param(*values, marks=[] if default else [pytest.mark.full])


def step_case(
    bench: Bench,
    base_name: str,
    shapes: str,
    baselines: tuple[str, ...],
    *,
    dtype: str = "float32",
    adaptive: bool = False,
    variant: str = "",
    timing: dict[str, float] | None = None,
    **settings: Any,
) -> None:
    base, options, second_bytes = BASES[base_name]
    start = make_params(SHAPES[shapes], DTYPES[dtype], bench.device)
    problem = Problem(start, base, options, rho=0.5 if adaptive else 0.05, adaptive=adaptive)
    methods = peers.make_all(bench, baselines, problem, **settings)
    # The norm of an adaptive group reads the weights too.
    per_element = {"first_step": 24 if adaptive else 20, "second_step": second_bytes}
    size = problem.elements * DTYPES[dtype].itemsize // 4
    bench.run(
        f"{base_name}{variant}",
        shapes,
        {name: steps_of(method, problem.gradients, **timing or {}) for name, method in methods.items()},
        elements=problem.elements,
        bytes_moved={stage: count * size for stage, count in per_element.items()},
        total="optimizer step",
        plan=Plan(rounds=(3, 4)) if shapes == TINY or elements(shapes) >= LARGE else Plan(),
        settings={name: method.settings for name, method in methods.items()},
    )


@pytest.mark.parametrize(
    ("base", "shapes"), [case(b, shapes, default=(b, shapes) not in FULL) for b in BASES for shapes in SHAPES]
)
def test_optimizer_step(bench: Bench, base: str, shapes: str) -> None:
    every = bench.full or (base == "SGD" and shapes in EVERY_BASELINE)
    baselines = ALL if every else TARGETS if base == "SGD" and shapes in MODELS else FEW
    # Compiling takes a while, and longer the more tensors there are.
    compiled = bench.full or (not bench.machine.gpu and (shapes, base) == ("resnet18", "SGD"))
    step_case(bench, base, shapes, (*baselines, COMPILED) if compiled else baselines)


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", EVERY_BASELINE)
def test_optimizer_step_with_launches(bench: Bench, shapes: str) -> None:
    """What a training loop waits for whose device is idle, as it is where launching takes longer than the work."""
    step_case(bench, "SGD", shapes, ALL, variant=", with launches", timing={"head_start": WITH_LAUNCHES})


VARIANTS: dict[str, dict[str, Any]] = {"flatten": {"flatten": True}, "adaptive": {"adaptive": True}}
VARIANTS |= {name: {"dtype": name} for name in DTYPES if name != "float32"}
VARIANTS |= {f"{name} backend": {"backend": name} for name in ("triton", "torch")}
DEFAULT_VARIANTS = ("flatten", "adaptive", "bfloat16", "triton backend", "torch backend")


@pytest.mark.parametrize(
    ("base", "variant", "shapes"),
    [
        case(b, v, s, default=(b, s) == ("SGD", "resnet18") and v in DEFAULT_VARIANTS)
        for b, v, s in itertools.product(BASES, VARIANTS, SHAPES)
        if (b, v) != ("AdamW", "float16")  # see op_cases in test_ops.py
    ],
)
def test_optimizer_step_variants(bench: Bench, base: str, variant: str, shapes: str) -> None:
    options = VARIANTS[variant]
    if "backend" in options and options["backend"] not in usable(bench.device)[1:]:
        pytest.skip("not here, or the best, which the other tests measure")
    step_case(bench, base, shapes, FEW, variant=f", {variant}", **options)


@pytest.mark.parametrize("shapes", ["resnet18", "efficientnet_b0", case("resnet50", default=False)])
def test_reference_is_no_straw_man(bench: Bench, shapes: str) -> None:
    """reference.py against a loop with the public implementation's operations, written independently."""
    base, options, _ = BASES["SGD"]
    problem = Problem(make_params(SHAPES[shapes], device=bench.device), base, options)
    methods = {name: peers.make(name, problem) for name in (REFERENCE, PUBLIC_LOOP)}
    bench.check(problem, methods, norm_error=peers.NORM_ERROR)
    bench.run(
        "reference and public loop",
        shapes,
        {name: steps_of(method, problem.gradients) for name, method in methods.items()},
        elements=problem.elements,
        total="optimizer step",
        settings={name: method.settings for name, method in methods.items()},
    )


@pytest.mark.parametrize("flatten", [False, True], ids=["default", "flatten"])
@pytest.mark.parametrize("tensors", [1, 161, case(10_000, default=False)])
def test_host_overhead(bench: Bench, tensors: int, flatten: bool) -> None:
    """The two steps on parameters of 8 elements: the time is all overhead."""
    base, options, _ = BASES["SGD"]
    problem = Problem(make_params([[8]] * tensors, device=bench.device), base, options)
    methods = peers.make_all(bench, FEW, problem, flatten=flatten)
    name = f"{tensors} x 8{', flatten' if flatten else ''}"
    contenders = {n: steps_of(method, problem.gradients, head_start=HOST_ALONE) for n, method in methods.items()}
    bench.run("host time", name, contenders, elements=8 * tensors, plan=Plan(seconds=0.4, rounds=(5, 60)))
    # The same where nothing else has used the caches in between.
    alone = {OURS: contenders[OURS]}
    bench.run("host time, alone", name, alone, elements=8 * tensors, plan=Plan(seconds=0.1, rounds=(15, 100)))


BY_ELEMENTS, BY_TENSORS = "number of parameters", "number of tensors"
SPLIT, FIXED = 100, 1_000_000
"""Tensors for each number of elements, elements for each number of tensors."""
THREADS = sorted({1, torch.get_num_threads()})
GROWING = [(BY_ELEMENTS, 10**n, SPLIT) for n in range(4, 9)] + [(BY_TENSORS, FIXED, 10**n) for n in range(5)]
LONG = {(BY_ELEMENTS, 10**8, SPLIT), (BY_TENSORS, FIXED, 10**4)}


@pytest.mark.parametrize(
    ("against", "count", "tensors", "threads"),
    [case(*growing, k, default=growing not in LONG) for growing in GROWING for k in THREADS],
)
def test_scaling(bench: Bench, against: str, count: int, tensors: int, threads: int) -> None:
    """How the whole step's cost grows: with the number of elements, and with that of tensors that hold the same."""
    if bench.machine.gpu and threads != torch.get_num_threads():
        pytest.skip("threads are the CPU's")
    base, options, second_bytes = BASES["SGD"]
    count = min(count, 10_000) if bench.smoke else count
    problem = Problem(make_params([[max(count // tensors, 1)]] * tensors, device=bench.device), base, options)
    methods = peers.make_all(bench, (REFERENCE,), problem)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bench.run(
            f"scaling with the {against}, {threads} thread{'s' if threads > 1 else ''}",
            f"{count:.0e} in {tensors}".replace("e+0", "e"),
            {name: steps_of(method, problem.gradients) for name, method in methods.items()},
            elements=count,
            bytes_moved={"first_step": 20 * count, "second_step": second_bytes * count},
            total="optimizer step",
            plan=Plan(seconds=0.2, rounds=(3, 10)),
            tensors=tensors,
        )
    finally:
        torch.set_num_threads(before)
