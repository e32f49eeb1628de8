"""The whole optimizer step: first_step, restore and the base optimizer, against the reference with the same base optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.harness import SHAPES, Backward, Contender, Row, copies, make_params, measure, rounds_for
from sam_fast import SAM
from sam_fast.reference import ReferenceSAM

SGD: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}


def contender(optimizer: SAM | ReferenceSAM, params: list[nn.Parameter]) -> Contender:
    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return Contender(step, prepare=Backward(params), finish=optimizer.zero_grad)


@pytest.mark.parametrize("model", SHAPES)
def test_optimizer_step(benchmark: Any, model: str) -> None:
    params = make_params(SHAPES[model])
    elements = sum(p.numel() for p in params)
    # The reference as people run it (on the CPU SGD's default is one parameter at a time), and with the base optimizer at its best.
    baselines = {}
    for name, options in (("reference", SGD), ("reference with fused SGD", {**SGD, "fused": True})):
        baseline_params = copies(params)
        baselines[name] = contender(ReferenceSAM(baseline_params, torch.optim.SGD, **options), baseline_params)

    optimizer = SAM(params, torch.optim.SGD, **SGD, fused=True)
    target = contender(optimizer, params)
    oracle_params = copies(params, torch.float64)
    oracle = ReferenceSAM(oracle_params, torch.optim.SGD, **SGD)
    for checked in (optimizer, oracle):
        checked.first_step()
        checked.second_step()
    for p, q in zip(params, oracle_params, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-6, atol=1e-8)

    benchmark.group = f"optimizer step {model}"
    measure(benchmark, Row("first_step + restore + SGD(fused=True)", model, elements), target, baselines, rounds=rounds_for(3 * elements))
