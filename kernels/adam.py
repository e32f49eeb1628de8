"""The step of torch.optim.Adam and AdamW, ``struct Adam`` in csrc/steps.h."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .formulas import divide, lerp, load, root, store

OPTIONS = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "amsgrad", "maximize")
STATES = {"exp_avg": None, "exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"}
COUNTS = True


def counted(options: dict[str, float], t: float) -> tuple[float, float]:
    """The bias corrections of step t: the first, and the root of the second."""
    return 1.0 - options["beta1"] ** t, math.sqrt(1.0 - options["beta2"] ** t)


def bases(options: dict[str, float]) -> tuple[float, float]:
    """What :func:`counted_from` takes besides a counter on the device: the logarithms of the two betas."""
    beta1, beta2 = options["beta1"], options["beta2"]
    return math.log2(beta1) if beta1 > 0.0 else -math.inf, math.log2(beta2) if beta2 > 0.0 else -math.inf


@triton.jit
def counted_from(base1, base2, t):
    """As :func:`counted`, on the device; ``1 - beta^t`` within about 2^-52."""
    return 1.0 - tl.exp2(t * base1), tl.sqrt(1.0 - tl.exp2(t * base2))


@triton.jit
def numbers(options, lr, counted, COMPUTE: tl.constexpr):
    _lr, beta1, beta2, eps, weight_decay, decoupled, _amsgrad, _maximize = options
    correction1, root_of_correction2 = counted
    # A decay of 0 and a factor of 1 change nothing.
    return (
        (1.0 - beta1).to(COMPUTE),
        beta2.to(COMPUTE),
        (1.0 - beta2).to(COMPUTE),
        eps.to(COMPUTE),
        tl.where(decoupled != 0.0, 0.0, weight_decay).to(COMPUTE),
        tl.where(decoupled != 0.0, 1.0 - lr * weight_decay, 1.0).to(COMPUTE),
        (-lr / correction1).to(COMPUTE),
        root_of_correction2.to(COMPUTE),
    )


@triton.jit
def apply(w, g, states, mask, numbers):
    keep1, beta2, keep2, eps, decay, factor, minus_step_size, root_of_correction2 = numbers
    g = tl.where(decay != 0.0, tl.fma(w, decay, g), g)
    w = w * factor
    m = load(states[0], mask, w.dtype)
    v = load(states[1], mask, w.dtype)
    m = lerp(m, g, keep1)
    v = tl.fma(g * keep2, g, v * beta2)
    store(states[0], mask, m)
    store(states[1], mask, v)
    if len(states) == 3:
        before = load(states[2], mask, w.dtype)
        v = tl.where((before > v) | (before != before), before, v)  # as torch.maximum: NaN stays
        store(states[2], mask, v)
    return w + divide(m * minus_step_size, divide(root(v), root_of_correction2) + eps)
