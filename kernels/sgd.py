"""torch.optim.SGD, as ``Sgd`` in csrc/steps.h. Options: lr, momentum, dampening, weight_decay, nesterov, maximize."""

from __future__ import annotations

import triton
import triton.language as tl

from .step import Step


@triton.jit
def _used(options):
    return 1 if tl.load(options + 1) != 0.0 else 0


@triton.jit
def _numbers(options, lr, first, second, COMPUTE: tl.constexpr):
    momentum = tl.load(options + 1).to(COMPUTE)
    keep = (1.0 - tl.load(options + 2)).to(COMPUTE)
    decay = tl.load(options + 3).to(COMPUTE)
    nesterov = tl.load(options + 4).to(COMPUTE)
    return (-lr).to(COMPUTE), momentum, keep, decay, nesterov


@triton.jit
def _apply(w, g, m, s1, s2, numbers, STATES: tl.constexpr):
    minus_lr, momentum, keep, decay, nesterov = numbers
    g = tl.where(decay != 0.0, tl.fma(w, decay, g), g)
    if STATES == 1:
        m = tl.fma(g, keep, m * momentum)
        g = tl.where(nesterov != 0.0, tl.fma(m, momentum, g), m)
    return tl.fma(g, minus_lr, w), m, s1, s2


STEP = Step(options=6, states=1, fewest=0, counts=False, used=_used, numbers=_numbers, apply=_apply)
