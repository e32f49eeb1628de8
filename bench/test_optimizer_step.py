"""The whole optimizer step: first_step, restore and the base optimizer, against the reference with the same base optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.harness import ROWS, SHAPES, Row, copies, make_params, measure, rounds_for
from sam_fast import SAM
from sam_fast.reference import ReferenceSAM

SGD = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}


@pytest.mark.parametrize("model", SHAPES)
def test_optimizer_step(benchmark: Any, model: str) -> None:
    params = make_params(SHAPES[model])
    elements = sum(p.numel() for p in params)
    baseline_params = copies(params)
    optimizer = SAM(params, torch.optim.SGD, **SGD, fused=True)
    # The reference as people run it (foreach is not chosen on the CPU by default), and with the base optimizer at its best.
    reference = ReferenceSAM(baseline_params, torch.optim.SGD, **SGD)
    fused_params = copies(params)
    fused_reference = ReferenceSAM(fused_params, torch.optim.SGD, **SGD, fused=True)

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    def reference_step() -> None:
        reference.first_step()
        reference.second_step()

    def fused_reference_step() -> None:
        fused_reference.first_step()
        fused_reference.second_step()

    oracle_params = copies(params, torch.float64)
    oracle = ReferenceSAM(oracle_params, torch.optim.SGD, **SGD)
    step()
    oracle.first_step()
    oracle.second_step()
    for p, q in zip(params, oracle_params, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-6, atol=1e-8)

    benchmark.group = f"optimizer step {model}"
    seconds, medians = measure(
        benchmark, step, {"reference": reference_step, "reference with fused SGD": fused_reference_step}, rounds=rounds_for(2 * elements)
    )
    ROWS.append(Row("first_step + restore + SGD(fused=True)", model, elements, seconds, medians))
