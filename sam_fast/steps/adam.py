"""torch.optim.Adam and AdamW."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from .rule import Rule, first_counter


class AdamRule(Rule):
    name = "adam"
    classes = ("torch.optim.adam.Adam",)
    decoupled: ClassVar[bool] = False
    """Whether weight decay is AdamW's where the group does not say."""

    options = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "amsgrad", "maximize")
    states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    counter = "step"
    has_fused = True

    def values(self, group: dict[str, Any], base: Optimizer) -> list[Any]:
        decay = [group["weight_decay"], group.get("decoupled_weight_decay", self.decoupled)]
        return [group["lr"], *group["betas"], group["eps"], *decay, group["amsgrad"], group["maximize"]]

    def takes(self, group: dict[str, Any]) -> tuple[str, ...]:
        return tuple(name for name in self.all_names if group["amsgrad"] or name != "max_exp_avg_sq")

    def first_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor] | None:
        zeros = {name: torch.zeros_like(param, requires_grad=False) for name in self.takes(group) if name != "step"}
        return {"step": first_counter(param, group), **zeros}

    def step(
        self, options: dict[str, float], w: list[Tensor], g: list[Tensor], states: dict[str, list[Tensor]], fused: bool
    ) -> None:
        numbers: Any = {name: options[name] for name in ("beta1", "beta2", "lr", "weight_decay", "eps")}
        flags: Any = {name: bool(options[name]) for name in ("amsgrad", "maximize")} | {"fused": fused or None}
        adam(
            w,
            g,
            states["exp_avg"],
            states["exp_avg_sq"],
            states["max_exp_avg_sq"],
            states["step"],
            has_complex=w[0].is_complex(),
            decoupled_weight_decay=bool(options["decoupled"]),
            **numbers,
            **flags,
        )


class AdamWRule(AdamRule):
    classes = ("torch.optim.adamw.AdamW",)
    decoupled = True
