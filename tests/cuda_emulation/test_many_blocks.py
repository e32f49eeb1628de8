"""As many blocks as a large GPU runs at once, so that perturb adds up more partial sums than a block has threads.

A process of its own sets the number: ``tests/test_cuda_emulation.py`` starts it, every night.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch
from cases import buckets_of, make_params, norm_tolerance, same_bits, values

from sam_fast import SAM
from sam_fast.backends import GroupOptions

BLOCKS = int(os.environ.get("SAM_FAST_EMULATED_BLOCKS", "3"))

if "cuda_emulation.plugin" not in sys.modules or BLOCKS < 257:
    pytest.skip("needs the emulated CUDA module and SAM_FAST_EMULATED_BLOCKS=660", allow_module_level=True)

pytestmark = pytest.mark.stand_in


def test_more_partial_sums_than_threads():
    """Every tensor is one tile, so every block has one tensor: each partial sum is another number, and none may be
    missing.
    """
    sizes = [1 + i % 70 for i in range(BLOCKS + 40)]
    params, twin = make_params(sizes), make_params(sizes)
    optimizer = SAM(params, lr=0.1, momentum=0.9, perturb_eps=0.0, backend="cuda")
    start = values(params)
    optimizer.first_step()
    (bucket,) = buckets_of(optimizer)
    partials = torch.zeros(bucket.num_partials, dtype=torch.float64)
    options = GroupOptions(optimizer.param_groups)
    bucket.grad_norm(options, partials)
    assert bucket.num_partials == BLOCKS
    assert int((partials > 0).sum()) == BLOCKS
    norm = torch.cat([p.grad.double() for p in twin]).norm()
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=norm_tolerance("cuda"))
    scale = float((0.05 / optimizer.grad_norm).float())
    assert same_bits(values(params), [q.detach() + q.grad * scale for q in twin])
    optimizer.restore()
    assert same_bits(values(params), start)
    optimizer.first_step()
    optimizer.second_step()
    assert same_bits(values(params), [q.detach() - 0.1 * q.grad for q in twin]) or all(
        torch.allclose(p, q - 0.1 * q.grad, rtol=0, atol=1e-7) for p, q in zip(params, twin, strict=True)
    )
