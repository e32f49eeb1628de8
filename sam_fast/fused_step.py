"""The second step in one pass: put the weights back and step as SGD, Adam or AdamW does, for base optimizers that are exactly these.

The state stays the base optimizer's own, in its format, so that checkpoints move freely between SAM(AdamW) and AdamW. Whatever a kernel does not
do goes through ``restore`` and ``base_optimizer.step()``: other optimizers and their subclasses, hooks, the options listed below, ``flatten=True``,
and the steps in which the base optimizer has yet to make a parameter's state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from .amp import Scaling
from .backends.base import StateTensors
from .bucket import Bucket
from .perturbation import Perturbation


class Rule(ABC):
    """How one family of base optimizers steps: which kernel, which of a group's options it takes, which state belongs to a parameter."""

    operation: str

    @abstractmethod
    def options(self, group: dict[str, Any]) -> list[Any]:
        """A group's options in the order of the kernel's table."""

    @abstractmethod
    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state that a parameter of this group has once it has taken a step."""

    all_names: tuple[str, ...]


class SgdRule(Rule):
    operation = "restore_sgd"
    all_names = ("momentum_buffer",)

    def options(self, group: dict[str, Any]) -> list[Any]:
        return [group["lr"], group["momentum"], group["dampening"], group["weight_decay"], group["nesterov"], group["maximize"]]

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()


class AdamRule(Rule):
    operation = "restore_adam"
    all_names = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(self, decoupled: bool) -> None:
        self.decoupled = decoupled

    def options(self, group: dict[str, Any]) -> list[Any]:
        decoupled = group.get("decoupled_weight_decay", self.decoupled)
        return [group["lr"], *group["betas"], group["eps"], group["weight_decay"], decoupled, group["amsgrad"], group["maximize"]]

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.all_names if group["amsgrad"] else self.all_names[:-1]


RULES: dict[type[Optimizer], Rule] = {
    torch.optim.SGD: SgdRule(),
    torch.optim.Adam: AdamRule(decoupled=False),
    torch.optim.AdamW: AdamRule(decoupled=True),
}
"""Exact class of the base optimizer -> its rule."""


def fused_step(perturbation: Perturbation, base: Optimizer, scaling: Scaling) -> bool:
    """Restore the weights and take the base optimizer's step in one pass. False if that cannot be done: then nothing has been changed.

    Args:
        perturbation: the weights are at ``w + e``; afterwards they are not.
        base: the base optimizer, whose options and state are used.
        scaling: what a GradScaler has done to the gradients. They stay scaled, unlike after the base optimizer's own step.
    """
    rule = RULES.get(type(base))
    if rule is None or perturbation.flatten or _is_watched(base) or not perturbation.fits(base.param_groups):
        return False
    if not all(rule.operation in bucket.backend.fused_steps for bucket in perturbation.buckets):
        return False
    grad_factor = _grad_factor(scaling, perturbation)
    if grad_factor is None:
        return False
    table = array("d")
    for group in base.param_groups:
        values = rule.options(group)
        if group.get("differentiable") or group.get("capturable") or not all(map(_is_number, values)):
            return False
        table.extend(map(float, values))
    states = []
    for bucket in perturbation.buckets:
        tensors = _state_of(bucket, base, rule)
        if tensors is None:
            return False
        states.append(StateTensors(tensors, table))
    if not all(bucket.backend.collect_step(bucket, state) for bucket, state in zip(perturbation.buckets, states, strict=True)):
        return False
    perturbation.restore_and_step(rule.operation, states, grad_factor)
    for bucket, state in zip(perturbation.buckets, states, strict=True):
        for row, step in zip(bucket.rows, state.tensors.get("step", ()), strict=False):
            if step is not None and row.numel() == 0:
                step += 1  # the kernels never come to a row without elements
    return True


def _grad_factor(scaling: Scaling, perturbation: Perturbation) -> float | None:
    """What gradients must be multiplied by; None if there must be no step, or if the base optimizer must see to it."""
    if scaling.grad_scale is None and scaling.found_inf is None:
        return 1.0
    if any(tensor is not None and tensor.device.type != "cpu" for tensor in (scaling.grad_scale, scaling.found_inf)):
        return None  # reading them would wait for the device
    if scaling.found_inf is not None and float(scaling.found_inf) != 0.0:
        return None
    if scaling.grad_scale is None:
        return 1.0
    if any(bucket.dtype == torch.float16 for bucket in perturbation.buckets):
        return None  # refused, see amp.step_base
    return float(scaling.grad_scale.double().reciprocal().float())  # rounded as GradScaler does it


def _is_watched(base: Optimizer) -> bool:
    """Whether somebody must see ``base.step()`` being called: it has hooks, or was replaced."""
    hooks = base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks
    global_hooks = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
    return bool(hooks or global_hooks or "step" in base.__dict__)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.device.type == "cpu" and not value.requires_grad
    return isinstance(value, (int, float))


def _state_of(bucket: Bucket, base: Optimizer, rule: Rule) -> dict[str, list[Tensor | None]] | None:
    """The state of every row that has a gradient; None if one of them has no complete state yet."""
    names = [rule.state_names(group) for group in base.param_groups]
    found: dict[str, list[Tensor | None]] = {name: [None] * len(bucket.rows) for name in rule.all_names}
    for index, (row, group) in enumerate(zip(bucket.rows, bucket.groups, strict=True)):
        if row.grad is None:
            continue
        state = base.state.get(row, {})
        for name in names[group]:
            tensor = state.get(name)
            if not isinstance(tensor, Tensor):
                return None
            found[name][index] = tensor
    return found
