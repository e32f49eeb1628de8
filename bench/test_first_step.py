"""first_step (norm, backup and climb) against the reference, on the parameter shapes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.harness import (
    BYTES_PER_ELEMENT,
    SHAPES,
    Backward,
    Contender,
    Row,
    check_first_step,
    copies,
    make_params,
    measure,
    rounds_for,
)
from sam_fast import SAM
from sam_fast.reference import ReferenceSAM


def contender(optimizer: SAM | ReferenceSAM, params: list[nn.Parameter]) -> Contender:
    """first_step in the loop that people write; what is around it (two backward passes, the second step with lr 0) is not timed."""
    backward = Backward(params)

    def finish() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.second_step(zero_grad=True)

    return Contender(optimizer.first_step, prepare=backward, finish=finish)


def run_case(benchmark: Any, group: str, model: str, bytes_per_element: int, *, flatten: bool = False, **options: Any) -> None:
    params = make_params(SHAPES[model])
    elements = sum(p.numel() for p in params)
    baseline_params = copies(params)
    optimizer = SAM(params, torch.optim.SGD, lr=0.0, flatten=flatten, **options)
    reference = ReferenceSAM(baseline_params, torch.optim.SGD, lr=0.0, **options)

    optimizer.first_step()
    check_first_step(params, baseline_params, **options)
    optimizer.restore()

    benchmark.group = f"{group} {model}"
    target, baseline = contender(optimizer, params), contender(reference, baseline_params)
    measure(benchmark, Row(group, model, elements, bytes_per_element), target, {"reference": baseline}, rounds=rounds_for(2 * elements))


@pytest.mark.parametrize("flatten", [False, True], ids=["default", "flatten"])
@pytest.mark.parametrize("model", SHAPES)
def test_first_step(benchmark: Any, model: str, flatten: bool) -> None:
    group = "first_step, flatten=True" if flatten else "first_step"
    run_case(benchmark, group, model, BYTES_PER_ELEMENT["first_step"], flatten=flatten, rho=0.05)


@pytest.mark.parametrize("model", ["resnet50"])
def test_first_step_adaptive(benchmark: Any, model: str) -> None:
    # The norm reads the weights too: 4 bytes more.
    run_case(benchmark, "first_step, adaptive", model, BYTES_PER_ELEMENT["first_step"] + 4, rho=0.5, adaptive=True)
