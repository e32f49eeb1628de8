"""first_step (norm, backup and climb) against the reference, on the parameter shapes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.harness import BYTES_PER_ELEMENT, ROWS, SHAPES, Row, check_first_step, copies, make_params, measure, rounds_for
from sam_fast import SAM
from sam_fast.reference import ReferenceSAM


@pytest.mark.parametrize("flatten", [False, True], ids=["default", "flatten"])
@pytest.mark.parametrize("model", SHAPES)
def test_first_step(benchmark: Any, model: str, flatten: bool) -> None:
    params = make_params(SHAPES[model])
    elements = sum(p.numel() for p in params)
    baseline_params = copies(params)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, flatten=flatten)
    reference = ReferenceSAM(baseline_params, torch.optim.SGD, lr=0.1)

    optimizer.first_step()
    check_first_step(params, baseline_params, rho=0.05)
    optimizer.restore()

    def reference_step() -> None:
        reference.first_step()

    def reference_reset() -> None:
        # What the reference's second_step does first; outside its timing.
        for p, old in reference.old.items():
            p.data = old
        reference.old.clear()

    def reset() -> None:
        optimizer.restore()
        reference_reset()

    benchmark.group = f"first_step {model}"
    seconds, medians = measure(benchmark, optimizer.first_step, {"reference": reference_step}, reset=reset, rounds=rounds_for(elements))
    group = "first_step" + (", flatten=True" if flatten else "")
    ROWS.append(Row(group, model, elements, seconds, medians, BYTES_PER_ELEMENT["first_step"]))


@pytest.mark.parametrize("model", ["resnet50"])
def test_first_step_adaptive(benchmark: Any, model: str) -> None:
    params = make_params(SHAPES[model])
    elements = sum(p.numel() for p in params)
    baseline_params = copies(params)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, rho=0.5, adaptive=True)
    reference = ReferenceSAM(baseline_params, torch.optim.SGD, lr=0.1, rho=0.5, adaptive=True)
    optimizer.first_step()
    check_first_step(params, baseline_params, rho=0.5, adaptive=True)
    optimizer.restore()

    def reset() -> None:
        optimizer.restore()
        for p, old in reference.old.items():
            p.data = old
        reference.old.clear()

    benchmark.group = f"first_step adaptive {model}"
    seconds, medians = measure(benchmark, optimizer.first_step, {"reference": reference.first_step}, reset=reset, rounds=rounds_for(elements))
    # The norm reads the weights too: 4 bytes more.
    ROWS.append(Row("first_step, adaptive", model, elements, seconds, medians, BYTES_PER_ELEMENT["first_step"] + 4))
