"""The step of torch.optim.SGD, ``struct Sgd`` in csrc/steps.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .formulas import load, store

OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
STATES = {"momentum_buffer": "momentum"}
COUNTS = False


@triton.jit
def numbers(options, lr, counted, COMPUTE: tl.constexpr):
    _lr, momentum, dampening, decay, nesterov, _maximize = options
    return (
        (-lr).to(COMPUTE),
        momentum.to(COMPUTE),
        (1.0 - dampening).to(COMPUTE),
        decay.to(COMPUTE),
        nesterov != 0.0,
    )


@triton.jit
def apply(w, g, states, mask, numbers):
    minus_lr, momentum, keep, decay, nesterov = numbers
    g = tl.where(decay != 0.0, tl.fma(w, decay, g), g)
    if len(states) == 1:
        m = tl.fma(g, keep, load(states[0], mask, w.dtype) * momentum)
        store(states[0], mask, m)
        g = tl.where(nesterov, tl.fma(m, momentum, g), m)
    return tl.fma(g, minus_lr, w)
