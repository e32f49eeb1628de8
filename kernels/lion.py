"""Lion, as ``Lion`` in csrc/steps.h.

Options: lr, beta1, beta2, weight_decay, coupled, fixed_decay, interpolated, maximize.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .formulas import lerp
from .step import Step


@triton.jit
def _used(options):
    return 1


@triton.jit
def _numbers(options, lr, first, second, COMPUTE: tl.constexpr):
    beta1 = tl.load(options + 1)
    beta2 = tl.load(options + 2)
    weight_decay = tl.load(options + 3)
    coupled = tl.load(options + 4) != 0.0
    # A decay of 0 and a factor of 1 change nothing.
    decay = tl.where(coupled, weight_decay, 0.0).to(COMPUTE)
    decoupled = 1.0 - weight_decay * tl.where(tl.load(options + 5) != 0.0, 1.0, lr)
    factor = tl.where(coupled, 1.0, decoupled).to(COMPUTE)
    keep1 = (1.0 - beta1).to(COMPUTE)
    keep2 = (1.0 - beta2).to(COMPUTE)
    interpolated = tl.load(options + 6).to(COMPUTE)
    return (-lr).to(COMPUTE), beta1.to(COMPUTE), keep1, beta2.to(COMPUTE), keep2, decay, factor, interpolated


@triton.jit
def _average(m, g, beta, keep, interpolated):
    return tl.where(interpolated != 0.0, lerp(m, g, keep), tl.fma(g, keep, m * beta))


@triton.jit
def _apply(w, g, m, s1, s2, numbers, STATES: tl.constexpr):
    minus_lr, beta1, keep1, beta2, keep2, decay, factor, interpolated = numbers
    g = tl.where(decay != 0.0, tl.fma(w, decay, g), g)
    direction = _average(m, g, beta1, keep1, interpolated)
    sign = tl.where(direction > 0.0, 1.0, tl.where(direction < 0.0, -1.0, 0.0)).to(w.dtype)
    return tl.fma(sign, minus_lr, w * factor), _average(m, g, beta2, keep2, interpolated), s1, s2


STEP = Step(options=8, states=1, fewest=1, counts=False, used=_used, numbers=_numbers, apply=_apply)
