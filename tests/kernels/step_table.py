"""The fused steps, one row each: cases of options, the state that they use, and the step in float64 as in its paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LR, DECAY = 0.1, 0.01

Options = tuple[float, ...]
State = dict[str, Tensor]

SIGNED, FAR, POSITIVE, COUNTER = "signed", "far", "positive", "counter"
"""Kinds of state: of either sign; of either sign and at least 0.01, so that the sign of its average with a gradient
does not depend on a rounding; at least 1e-4 (m / sqrt(v) would otherwise magnify the rounding of m); step counters."""


@dataclass(frozen=True)
class Row:
    """A fused step.

    Args:
        cases: options in the kernel's order, by name of the case.
        states: the kind of each state.
        uses: whether a case has this state.
        step: the new weight and the new states, from options, weight, gradient and state in float64.
    """

    cases: dict[str, Options]
    states: dict[str, str]
    uses: Callable[[Options, str], bool]
    step: Callable[[Options, Tensor, Tensor, State], tuple[Tensor, State]]


def sgd(options: Options, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
    lr, momentum, dampening, decay, nesterov, maximize = options
    d = (-g if maximize else g) + decay * w
    if momentum == 0.0:
        return w - lr * d, {}
    m = momentum * state["momentum_buffer"] + (1 - dampening) * d
    return w - lr * (d + momentum * m if nesterov else m), {"momentum_buffer": m}


def adam(options: Options, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
    lr, beta1, beta2, eps, decay, decoupled, amsgrad, maximize = options
    g = -g if maximize else g
    if decoupled:
        w = w * (1 - lr * decay)
    else:
        g = g + decay * w
    t = float(state["step"]) + 1
    m = beta1 * state["exp_avg"] + (1 - beta1) * g
    v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
    new = {"step": torch.tensor(t), "exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        new["max_exp_avg_sq"] = v = torch.maximum(state["max_exp_avg_sq"], v)
    denominator = (v / (1 - beta2**t)).sqrt() + eps
    return w - lr / (1 - beta1**t) * m / denominator, new


def lion(options: Options, w: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
    lr, beta1, beta2, decay, coupled, fixed_decay, _, maximize = options
    g, m = -g if maximize else g, state["exp_avg"]
    if coupled:
        g = g + decay * w
    else:
        w = w * (1 - decay * (1 if fixed_decay else lr))
    return w - lr * (beta1 * m + (1 - beta1) * g).sign(), {"exp_avg": beta2 * m + (1 - beta2) * g}


STEPS: dict[str, Row] = {
    "sgd": Row(
        cases={
            "plain": (LR, 0.0, 0.0, 0.0, 0, 0),
            "momentum": (LR, 0.9, 0.25, DECAY, 0, 0),
            "nesterov": (LR, 0.9, 0.0, DECAY, 1, 1),
        },
        states={"momentum_buffer": SIGNED},
        uses=lambda options, name: options[1] != 0.0,
        step=sgd,
    ),
    "adam": Row(
        cases={
            "adam": (LR, 0.9, 0.99, 1e-8, DECAY, 0, 0, 0),
            "adamw": (LR, 0.9, 0.99, 1e-8, DECAY, 1, 0, 0),
            "amsgrad": (LR, 0.9, 0.99, 1e-8, 0.0, 0, 1, 1),
        },
        states={"step": COUNTER, "exp_avg": SIGNED, "exp_avg_sq": POSITIVE, "max_exp_avg_sq": POSITIVE},
        uses=lambda options, name: name != "max_exp_avg_sq" or options[6] != 0,
        step=adam,
    ),
    "lion": Row(
        cases={
            "lion": (LR, 0.9, 0.99, DECAY, 0, 0, 0, 0),
            "lion-lerp": (LR, 0.95, 0.4, DECAY, 0, 1, 1, 1),
            "lion-coupled": (LR, 0.9, 0.99, DECAY, 1, 0, 1, 0),
        },
        states={"exp_avg": FAR},
        uses=lambda options, name: True,
        step=lion,
    ),
}

CASES = [(rule, name) for rule, row in STEPS.items() for name in row.cases]
