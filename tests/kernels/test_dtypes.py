"""The 16-bit formats: every one of the 65,536 bit patterns widens and narrows as PyTorch does it."""

from __future__ import annotations

import pytest
import torch
from cases import norm_tolerance, same_bits

FORMATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def every_value(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.guarantee(id="restore")
@FORMATS
def test_every_finite_value_survives_a_perturbation_of_zero(step, dtype):
    """w + 0 widens and narrows w: the same bits must come out (but for -0.0 + 0.0 = 0.0)."""
    w = every_value(dtype).clone()
    before = w.clone()
    w.grad = torch.zeros_like(w)
    step([w]).first_step()
    negative_zero = before == 0.0
    assert same_bits([w[~negative_zero]], [before[~negative_zero]])
    assert bool((w[negative_zero] == 0.0).all())


@FORMATS
def test_every_value_is_rounded_to_nearest_even(step, dtype):
    """w + e for every w, with e near half a unit in w's last place, against PyTorch's own conversion from float32."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        w = every_value(dtype).clone()
        ulp = (torch.nextafter(w.abs(), torch.full_like(w, float("inf"))).float() - w.abs().float()).nan_to_num(
            posinf=0.0
        )
        factor = torch.randint(-6, 7, w.shape, generator=generator, device="cpu").to(w.device) * 0.25  # ties included
        w.grad = (ulp * factor).to(dtype)
        w.grad[~w.grad.isfinite()] = 0.0
        s = step([w], options=[{"rho": 1.0}])
        s.grad_norm()
        s.partials.fill_(0.0)
        s.partials[0] = 1.0  # a norm of 1 and no eps: e = g, exactly
        want = (w.float() + w.grad.float()).to(dtype)
        s.perturb(eps=0.0)
        assert same_bits([w + 0.0], [want + 0.0])


@FORMATS
def test_gradients_widen_exactly(step, dtype, kernels):
    g = every_value(dtype).clone()
    g[g.float().abs() > 1e15] = 0.0
    w = torch.zeros_like(g)
    w.grad = g
    norm = step([w]).grad_norm()
    assert norm == pytest.approx(float(g.double().square().sum().sqrt()), rel=norm_tolerance(kernels.name))
