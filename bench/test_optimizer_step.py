"""The whole optimizer step, and its two halves: first_step (norm, backup, perturb) and second_step (restore and the
base optimizer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.clock import WITH_LAUNCHES
from bench.harness import FEWER_PARTS, PARTS, Bench, Method, Plan, Problem, make_params, usable
from bench.peers import COMPILED, FOREACH, PEER_FOREACH, PEER_LOOP, REFERENCE, REFERENCE_FUSED
from bench.shapes import MODELS, ONE, SHAPES, TINY, elements

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], int]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}, 20),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 1e-2}, 28),
}
"""Name -> class, options, and the bytes per float32 element that second_step must move."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ALL = (REFERENCE, REFERENCE_FUSED, PEER_LOOP, PEER_FOREACH, FOREACH)
SOME = (REFERENCE, REFERENCE_FUSED, FOREACH)
TARGETS = (REFERENCE, PEER_LOOP, FOREACH)
FEW = (REFERENCE, FOREACH)
LARGE = 30_000_000
"""Elements from which on contenders are made anew for each part of a case; what smaller ones hold is kept in the
meantime.
"""
EVERY_BASELINE = ("resnet18", "resnet50")
"""Shape sets on which the default selection runs all baselines, with SGD; elsewhere those that a target speaks of, and
the more rounds of them.
"""


def step_case(
    bench: Bench,
    base_name: str,
    shapes: str,
    baselines: tuple[str, ...],
    *,
    dtype: str = "float32",
    adaptive: bool = False,
    variant: str = "",
    part: int | None = None,
    timing: dict[str, float] | None = None,
    **settings: Any,
) -> None:
    base, options, second_bytes = BASES[base_name]

    def make(check: bool) -> tuple[dict[str, Method], list[Tensor]]:
        start = make_params(SHAPES[shapes], dtype=DTYPES[dtype], device=bench.device)
        problem = Problem(start, base, options, rho=0.5 if adaptive else 0.05, adaptive=adaptive, checks=check)
        target = peers.sam_fast(problem, **settings)
        problem.check("sam_fast", target)
        methods, left_out = peers.make(baselines, problem)
        if check:
            bench.left_out += [f"{base_name}, {shapes}: {text}" for text in left_out]
        return {"sam_fast": target, **methods}, problem.gradients()

    large = elements(shapes) >= LARGE
    methods, gradients = bench.kept((base_name, shapes, variant), part, make, anew=large)
    count = sum(g.numel() for g in gradients)
    size = DTYPES[dtype].itemsize
    # The norm of an adaptive group reads the weights too.
    moved = {
        "first_step": (24 if adaptive else 20) * count * size // 4,
        "second_step": second_bytes * count * size // 4,
    }
    bench.run(
        f"{base_name}{variant}",
        shapes,
        {name: method.contender(gradients, **timing or {}) for name, method in methods.items()},
        elements=count,
        bytes_moved=moved,
        total="optimizer step",
        plan=Plan(rounds=(9, 9)) if part is None else Plan(rounds=(4, 4)) if large else SHORT,
        settings={name: method.settings for name, method in methods.items()},
    )


SHORT = Plan(seconds=1.0, rounds=(3, 8))
"""Of one part of a case."""


def parts_of(shapes: str) -> Sequence[int | None]:
    return (None,) if shapes == TINY else FEWER_PARTS if elements(shapes) >= LARGE else PARTS


FULL = {("SGD", ONE), ("AdamW", ONE), ("AdamW", TINY), ("AdamW", "gpt2")}
"""What takes longest and tells least."""


def step_cases() -> list[Any]:
    return [
        pytest.param(base, shapes, part, marks=[pytest.mark.full] if (base, shapes) in FULL else [])
        for base in BASES
        for shapes in SHAPES
        for part in parts_of(shapes)
    ]


@pytest.mark.parametrize(("base", "shapes", "part"), step_cases())
def test_optimizer_step(bench: Bench, base: str, shapes: str, part: int | None) -> None:
    every = bench.full or (base == "SGD" and shapes in EVERY_BASELINE)
    baselines = ALL if every else TARGETS if base == "SGD" and shapes in MODELS else FEW
    # Compiling takes a while, and longer the more tensors there are.
    compiled = (COMPILED,) if bench.full or (not bench.machine.gpu and (shapes, base) == ("resnet18", "SGD")) else ()
    step_case(bench, base, shapes, baselines + compiled, part=part)


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", EVERY_BASELINE)
def test_optimizer_step_with_launches(bench: Bench, shapes: str) -> None:
    """What a training loop waits for whose device is idle, as it is where launching takes longer than the work."""
    step_case(bench, "SGD", shapes, ALL, variant=", with launches", timing={"head_start": WITH_LAUNCHES})


VARIANTS: dict[str, dict[str, Any]] = {
    "flatten": {"flatten": True},
    "adaptive": {"adaptive": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "float64": {"dtype": "float64"},
}
DEFAULT_VARIANTS = {("flatten", "resnet18"), ("adaptive", "resnet18"), ("bfloat16", "resnet18")}


def variant_cases() -> list[Any]:
    return [
        pytest.param(
            base,
            variant,
            shapes,
            part,
            marks=[] if base == "SGD" and (variant, shapes) in DEFAULT_VARIANTS else [pytest.mark.full],
        )
        for base in BASES
        for variant in VARIANTS
        for shapes in SHAPES
        for part in parts_of(shapes)
        if (base, variant) != ("AdamW", "float16")  # see op_cases in test_ops.py
    ]


@pytest.mark.parametrize(("base", "variant", "shapes", "part"), variant_cases())
def test_optimizer_step_variants(bench: Bench, base: str, variant: str, shapes: str, part: int | None) -> None:
    step_case(bench, base, shapes, SOME if bench.full else FEW, variant=f", {variant}", part=part, **VARIANTS[variant])


DEFAULT_OTHERS = {("SGD", "resnet18"), ("AdamW", "resnet18"), ("SGD", "resnet50")}
"""What the torch backend is measured with without --full."""


@pytest.mark.parametrize(
    ("base", "shapes", "part"),
    [
        pytest.param(base, shapes, part, marks=[] if (base, shapes) in DEFAULT_OTHERS else [pytest.mark.full])
        for base in BASES
        for shapes in SHAPES
        for part in parts_of(shapes)
    ],
)
def test_optimizer_step_other_backends(bench: Bench, base: str, shapes: str, part: int | None) -> None:
    """Every backend but the best, which the other tests measure."""
    best, *others = usable(bench.device)
    for name in others:
        step_case(bench, base, shapes, FEW, variant=f", {name} backend", part=part, backend=name)
    if not others:
        pytest.skip(f"{best} is the only backend here")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shapes", ["resnet18", "efficientnet_b0", pytest.param("resnet50", marks=pytest.mark.full)])
def test_reference_is_no_straw_man(bench: Bench, shapes: str, part: int) -> None:
    """reference.py against a loop with the public implementation's operations, written independently.

    Target: at most 10 % slower.
    """
    base, options, _ = BASES["SGD"]

    def make(check: bool) -> tuple[dict[str, Method], list[Tensor]]:
        problem = Problem(make_params(SHAPES[shapes], device=bench.device), base, options, checks=check)
        return peers.make((REFERENCE, peers.PUBLIC_LOOP), problem)[0], problem.gradients()

    methods, gradients = bench.kept(("straw man", shapes), part, make)
    bench.run(
        "reference and public loop",
        shapes,
        {name: method.contender(gradients) for name, method in methods.items()},
        elements=elements(shapes),
        total="optimizer step",
        plan=SHORT,
        settings={name: method.settings for name, method in methods.items()},
    )
