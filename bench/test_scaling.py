"""How the whole step's cost grows: with the number of elements, and with the number of tensors that hold the same
elements.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.harness import FEWER_PARTS, PARTS, Bench, Method, Plan, Problem, make_params
from bench.test_optimizer_step import BASES

BY_ELEMENTS, BY_TENSORS = "number of parameters", "number of tensors"
ELEMENTS = [10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 200_000_000]
TENSORS = [1, 10, 100, 1000, 10_000]
SPLIT = 100
"""Tensors for each number of elements."""
LARGE = 20_000_000
"""Elements from which on contenders are made anew for each part."""
FIXED = 1_000_000
"""Elements for each number of tensors."""


def threads_cases() -> list[Any]:
    most = torch.get_num_threads()
    return [1, most] if most > 1 else [1]


def cases(counts: list[int], large_from: int, full_from: int) -> list[Any]:
    """Count, part and threads."""
    return [
        pytest.param(
            count, part, threads, marks=[pytest.mark.full] if count >= full_from * (2 if threads > 1 else 1) else []
        )
        for count in counts
        for part in (PARTS if count < large_from else FEWER_PARTS)
        for threads in threads_cases()
    ]


def scaling_case(bench: Bench, group: str, tensors: int, elements: int, threads: int, part: int) -> None:
    if bench.machine.gpu and threads != torch.get_num_threads():
        pytest.skip("threads are the CPU's")
    base, options, second_bytes = BASES["SGD"]
    if bench.smoke:
        elements = min(elements, 10_000)

    def make(check: bool) -> tuple[dict[str, Method], list[Tensor]]:
        problem = Problem(
            make_params([[max(elements // tensors, 1)]] * tensors, device=bench.device), base, options, checks=check
        )
        target = peers.sam_fast(problem)
        problem.check("sam_fast", target)
        return {"sam_fast": target, **peers.make((peers.REFERENCE,), problem)[0]}, problem.gradients()

    methods, gradients = bench.kept((group, tensors, elements, threads), part, make, anew=elements >= LARGE)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bench.run(
            f"scaling with the {group}, {threads} thread{'s' if threads > 1 else ''}",
            f"{elements:.0e} in {tensors}".replace("e+0", "e"),
            {name: method.contender(gradients) for name, method in methods.items()},
            elements=elements,
            bytes_moved={"first_step": 20 * elements, "second_step": second_bytes * elements},
            total="optimizer step",
            plan=Plan(seconds=0.2, rounds=(4, 10)),
            tensors=tensors,
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("elements", "part", "threads"), cases(ELEMENTS, LARGE, 100_000_000))
def test_scaling_with_elements(bench: Bench, elements: int, part: int, threads: int) -> None:
    scaling_case(bench, BY_ELEMENTS, SPLIT, elements, threads, part)


@pytest.mark.parametrize(("tensors", "part", "threads"), cases(TENSORS, 10_000, 10_000))
def test_scaling_with_tensors(bench: Bench, tensors: int, part: int, threads: int) -> None:
    scaling_case(bench, BY_TENSORS, tensors, FIXED, threads, part)
