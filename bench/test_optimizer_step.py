"""The whole optimizer step: first_step, restore and the base optimizer, against the reference with the same base optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.harness import SHAPES, Backward, Contender, Row, copies, make_params, measure, rounds_for
from sam_fast import SAM
from sam_fast.reference import ReferenceSAM

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], int]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}, 40),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 1e-2}, 48),
}
"""Name -> class, options, and the bytes per float32 element that must move: 20 in first_step; then backup, gradient, state in, w and state out."""


def contender(optimizer: SAM | ReferenceSAM, params: list[nn.Parameter]) -> Contender:
    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return Contender(step, prepare=Backward(params), finish=optimizer.zero_grad)


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_step(benchmark: Any, name: str, model: str) -> None:
    base, options, bytes_per_element = OPTIMIZERS[name]
    params = make_params(SHAPES[model])
    elements = sum(p.numel() for p in params)
    # The reference as people run it (on the CPU the default is one parameter at a time), and with the base optimizer at its best.
    baselines = {}
    for baseline, extra in (("reference", {}), ("reference with fused=True", {"fused": True})):
        baseline_params = copies(params)
        baselines[baseline] = contender(ReferenceSAM(baseline_params, base, **options, **extra), baseline_params)

    optimizer = SAM(params, base, **options)
    target = contender(optimizer, params)
    oracle_params = copies(params, torch.float64)
    oracle = ReferenceSAM(oracle_params, base, **options)
    for _ in range(2):  # the first makes the state
        for checked, own in ((optimizer, params), (oracle, oracle_params)):
            Backward(own)()
            checked.first_step()
            checked.second_step()
    for p, q in zip(params, oracle_params, strict=True):
        # AdamW's steps are of the size of lr whatever the gradient: a gradient near zero may be rounded to either side of it.
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-6, atol=1e-8 if name == "SGD" else 1e-6)
    del oracle, oracle_params

    benchmark.group = f"optimizer step {name} {model}"
    row = Row(f"first_step + second_step, {name}", model, elements, bytes_per_element)
    measure(benchmark, row, target, baselines, rounds=rounds_for(3 * elements))
