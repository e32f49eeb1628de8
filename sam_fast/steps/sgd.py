"""torch.optim.SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from .rule import Rule


class SgdRule(Rule):
    name = "sgd"
    classes = ("torch.optim.sgd.SGD",)
    options = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    states = ("momentum_buffer",)
    has_fused = True

    def values(self, group: dict[str, Any], base: Optimizer) -> list[Any]:
        return [group[name] for name in self.options]

    def takes(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.states if group["momentum"] != 0 else ()

    def first_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor] | None:
        # PyTorch's first buffer is the gradient itself, without dampening. momentum * -0.0 + g has the bits of g, even
        # the sign of 0.
        if group["dampening"] != 0:
            return None
        return {"momentum_buffer": torch.full_like(param, -0.0, requires_grad=False)}

    def step(
        self, options: dict[str, float], w: list[Tensor], g: list[Tensor], states: dict[str, list[Tensor]], fused: bool
    ) -> None:
        buffers: list[Tensor | None] = list(states["momentum_buffer"]) or [None] * len(w)
        flags: Any = {name: bool(options[name]) for name in ("nesterov", "maximize")} | {"fused": fused or None}
        sgd(w, g, buffers, **{**options, **flags})
