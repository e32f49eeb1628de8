"""torch.optim.Adam and AdamW, as ``Adam`` in csrc/steps.h.

Options: lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .formulas import divide, lerp, root
from .step import Step


@triton.jit
def _used(options):
    return 3 if tl.load(options + 6) != 0.0 else 2


@triton.jit
def _numbers(options, lr, correction1, root_of_correction2, COMPUTE: tl.constexpr):
    keep1 = (1.0 - tl.load(options + 1)).to(COMPUTE)
    beta2 = tl.load(options + 2)
    eps = tl.load(options + 3).to(COMPUTE)
    weight_decay = tl.load(options + 4)
    decoupled = tl.load(options + 5) != 0.0
    # A decay of 0 and a factor of 1 change nothing.
    decay = tl.where(decoupled, 0.0, weight_decay).to(COMPUTE)
    factor = tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(COMPUTE)
    minus_step_size = (-lr / correction1).to(COMPUTE)
    keep2 = (1.0 - beta2).to(COMPUTE)
    return keep1, beta2.to(COMPUTE), keep2, eps, decay, factor, minus_step_size, root_of_correction2.to(COMPUTE)


@triton.jit
def _apply(w, g, m, v, largest, numbers, STATES: tl.constexpr):
    keep1, beta2, keep2, eps, decay, factor, minus_step_size, root_of_correction2 = numbers
    g = tl.where(decay != 0.0, tl.fma(w, decay, g), g)
    w = w * factor
    m = lerp(m, g, keep1)
    v = tl.fma(g * keep2, g, v * beta2)
    most = v
    if STATES == 3:
        largest = tl.where((largest > v) | (largest != largest), largest, v)  # as torch.maximum: NaN stays
        most = largest
    moved = w + divide(m * minus_step_size, divide(root(most), root_of_correction2) + eps)
    return moved, m, v, largest


STEP = Step(options=8, states=3, fewest=2, counts=True, used=_used, numbers=_numbers, apply=_apply)
