"""The step of Lion (Chen et al., https://arxiv.org/abs/2302.06675), ``struct Lion`` in csrc/steps.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .formulas import lerp, load, store

OPTIONS = ("lr", "beta1", "beta2", "weight_decay", "coupled", "fixed_decay", "interpolated", "maximize")
STATES = {"exp_avg": None}
COUNTS = False


@triton.jit
def numbers(options, lr, counted, COMPUTE: tl.constexpr):
    _lr, beta1, beta2, weight_decay, coupled, fixed_decay, interpolated, _maximize = options
    decoupled = 1.0 - weight_decay * tl.where(fixed_decay != 0.0, 1.0, lr)
    # A decay of 0 and a factor of 1 change nothing.
    return (
        (-lr).to(COMPUTE),
        beta1.to(COMPUTE),
        (1.0 - beta1).to(COMPUTE),
        beta2.to(COMPUTE),
        (1.0 - beta2).to(COMPUTE),
        tl.where(coupled != 0.0, weight_decay, 0.0).to(COMPUTE),
        tl.where(coupled != 0.0, 1.0, decoupled).to(COMPUTE),
        interpolated.to(COMPUTE),
    )


@triton.jit
def _average(m, g, beta, keep, interpolated):
    return tl.where(interpolated != 0.0, lerp(m, g, keep), tl.fma(g, keep, m * beta))


@triton.jit
def apply(w, g, states, mask, numbers):
    minus_lr, beta1, keep1, beta2, keep2, decay, factor, interpolated = numbers
    g = tl.where(decay != 0.0, tl.fma(w, decay, g), g)
    m = load(states[0], mask, w.dtype)
    u = _average(m, g, beta1, keep1, interpolated)
    store(states[0], mask, _average(m, g, beta2, keep2, interpolated))
    sign = tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, 0.0)).to(w.dtype)  # of NaN: 0
    return tl.fma(sign, minus_lr, w * factor)
