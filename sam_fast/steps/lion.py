"""Lion (Chen et al., https://arxiv.org/abs/2302.06675), as lion-pytorch and pytorch_optimizer have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .rule import NotFused, Rule


class LionRule(Rule):
    """lion_pytorch.Lion: decoupled weight decay; the averages are ``m * beta + g * (1 - beta)``."""

    name = "lion"
    classes = ("lion_pytorch.lion_pytorch.Lion",)
    options = ("lr", "beta1", "beta2", "weight_decay", "coupled", "fixed_decay", "interpolated", "maximize")
    states = ("exp_avg",)

    def values(self, group: dict[str, Any], base: Optimizer) -> list[Any]:
        if base.update_fn.__module__ != self.classes[0].rpartition(".")[0]:  # type: ignore[attr-defined]
            raise NotFused("use_triton=True")
        decay = group["weight_decay"]
        if base.decoupled_wd:  # type: ignore[attr-defined]
            decay /= base._init_lr  # type: ignore[attr-defined]
        return [group["lr"], *group["betas"], decay, False, False, False, False]

    def first_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor] | None:
        return {"exp_avg": torch.zeros_like(param, requires_grad=False)}

    def step(
        self, options: dict[str, float], w: list[Tensor], g: list[Tensor], states: dict[str, list[Tensor]], fused: bool
    ) -> None:
        lr, decay, m = options["lr"], options["weight_decay"], states["exp_avg"]
        if options["maximize"]:
            g = list(torch._foreach_neg(g))
        if options["coupled"]:
            g = list(torch._foreach_add(g, w, alpha=decay)) if decay else g
        else:
            torch._foreach_mul_(w, 1.0 - decay * (1.0 if options["fixed_decay"] else lr))
        directions = self._averages(m, g, options["beta1"], bool(options["interpolated"]))
        torch._foreach_copy_(m, self._averages(m, g, options["beta2"], bool(options["interpolated"])))
        torch._foreach_add_(w, [direction.sign_() for direction in directions], alpha=-lr)

    @staticmethod
    def _averages(m: list[Tensor], g: list[Tensor], beta: float, interpolated: bool) -> list[Tensor]:
        if interpolated:
            return list(torch._foreach_lerp(m, g, weight=1.0 - beta))
        return list(torch._foreach_add(torch._foreach_mul(m, beta), g, alpha=1.0 - beta))


class InterpolatedLionRule(LionRule):
    """pytorch_optimizer.Lion: also coupled and fixed weight decay; the averages are ``torch.lerp``'s."""

    classes = ("pytorch_optimizer.optimizer.lion.Lion",)
    group_counter = "step"

    def values(self, group: dict[str, Any], base: Optimizer) -> list[Any]:
        asked_for = [name for name in ("use_gc", "adanorm", "cautious") if group.get(name)]
        if asked_for:
            raise NotFused(f"Lion with {', '.join(f'{name}=True' for name in asked_for)}")
        decay = [group["weight_decay"], not group["weight_decouple"], group["fixed_decay"]]
        maximize: bool = base.maximize  # type: ignore[attr-defined]
        return [group["lr"], *group["betas"], *decay, True, maximize]
