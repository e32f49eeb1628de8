"""Each operation of the cpu backend by itself, per dtype: GB/s of the bytes that must move."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.harness import BYTES_PER_ELEMENT, SHAPES, Contender, Row, check_first_step, copies, make_params, measure, rounds_for
from sam_fast import SAM
from sam_fast.backends import GroupOptions

OPS = ["grad_norm", "perturb", "restore"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark: Any, op: str, dtype: torch.dtype) -> None:
    params = make_params(SHAPES["resnet50"], dtype=dtype)
    elements = sum(p.numel() for p in params)
    start = copies(params)
    optimizer = SAM(params, lr=0.1)
    optimizer.first_step()
    if dtype == torch.float32:
        check_first_step(params, start, rho=0.05)
    optimizer.restore()
    assert all(torch.equal(p, q) for p, q in zip(params, start, strict=True))

    (bucket, partials, sums), *_ = optimizer._perturbation._bucket_sums
    backend, options = bucket.backend, GroupOptions(optimizer.param_groups)
    assert backend.collect(bucket, options)
    run = {
        "grad_norm": lambda: backend.grad_norm(bucket, options, partials),
        "perturb": lambda: backend.perturb(bucket, options, sums.partials, 1e-12, sums.norm),
        "restore": lambda: backend.restore(bucket, release=False),
    }[op]
    if op == "restore":
        backend.save(bucket)
    benchmark.group = f"ops {op}"
    row = Row(f"op {op}", f"resnet50 {str(dtype).removeprefix('torch.')}", elements, BYTES_PER_ELEMENT[op] * dtype.itemsize // 4)
    measure(benchmark, row, Contender(run), {}, rounds=rounds_for(elements))
