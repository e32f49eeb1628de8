"""The second step in one pass: put the weights back and step as SGD, Adam or AdamW does, for base optimizers that are exactly these.

The state stays the base optimizer's own, in its format, so that checkpoints move freely between SAM(AdamW) and AdamW. Whatever a kernel does not
do goes through ``restore`` and ``base_optimizer.step()``: other optimizers and their subclasses, hooks, ``differentiable=True``, and the steps in
which the base optimizer has yet to make a parameter's state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from .amp import Scaling
from .backends.base import StateTensors
from .bucket import Bucket
from .perturbation import Perturbation
from .sharded import local_tensor


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


def fused_step(perturbation: Perturbation, base: Optimizer, scaling: Scaling, rounding_key: int | None = None) -> bool:
    """Restore the weights and take the base optimizer's step in one pass. False if that cannot be done: then nothing has been changed.

    Args:
        perturbation: the weights are at ``w + e``; afterwards they are not.
        base: the base optimizer, whose options and state are used.
        scaling: what a GradScaler has done to the gradients. They stay scaled, unlike after the base optimizer's own step.
        rounding_key: that of the new weights' stochastic rounding (:mod:`sam_fast.rounding`), or None.
    """
    rule = RULES.get(type(base))
    if rule is None or _is_watched(base) or not perturbation.fits(base.param_groups):
        return False
    buckets = perturbation.step_buckets()
    if buckets is None or not all(rule.operation in bucket.backend.fused_steps for bucket in buckets):
        return False
    ready = _on_host(scaling, buckets)
    if ready is None or (ready.found_inf is not None and not all(bucket.backend.decides_on_device for bucket in buckets)):
        return False
    with perturbation.own_step_grads() as known:
        if not known:
            return False
        states = []
        for bucket in buckets:
            state = _state_of(bucket, base, rule, rounding_key)
            if state is None or (ready.found_inf is not None and "step" in state.tensors and not state.device_steps):
                return False
            states.append(state)
        if not all(bucket.backend.collect_step(bucket, state) for bucket, state in zip(buckets, states, strict=True)):
            return False
        perturbation.restore_and_step(rule.operation, buckets, states, ready)
    for bucket, state in zip(buckets, states, strict=True):
        if bucket.backend.steps_empty_rows:
            continue
        for row, step in zip(bucket.rows, state.tensors.get("step", ()), strict=False):
            if step is not None and row.numel() == 0 and not state.device_steps:
                step += 1  # the kernels never come to a row without elements
    return True


def _on_host(scaling: Scaling, buckets: Sequence[Bucket]) -> Scaling | None:
    """The scaling as the kernels take it: what is on the host is decided here. None if there must be no step, or if the base must see to it."""
    if scaling.grad_scale is not None and any(bucket.dtype == torch.float16 for bucket in buckets):
        return None  # refused, see amp.step_base
    if scaling.found_inf is None or scaling.found_inf.device.type != "cpu":
        return scaling
    return None if float(scaling.found_inf) != 0.0 else Scaling(scaling.grad_scale, None)


def _is_watched(base: Optimizer) -> bool:
    """Whether somebody must see ``base.step()`` being called: it has hooks, or was replaced."""
    hooks = base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks
    global_hooks = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
    return bool(hooks or global_hooks or "step" in base.__dict__)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.device.type == "cpu" and not value.requires_grad
    return isinstance(value, (int, float))


def _options_of(bucket: Bucket, base: Optimizer, rule: Rule) -> tuple[array[float], list[Tensor | None]] | None:
    """The table of all groups' options, and the learning rates that are on the bucket's device; None if a kernel cannot take one."""
    table = array("d")
    learning_rates: list[Tensor | None] = []
    present = set(bucket.groups)
    for index, group in enumerate(base.param_groups):
        lr, *others = rule.options(group)
        if index not in present:
            learning_rates.append(None)
            table.extend([math.nan] * (1 + len(others)))
            continue
        if group.get("differentiable") or (group.get("capturable") and bucket.device.type == "cpu") or not all(map(_is_number, others)):
            return None
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        if on_device and (lr.device != bucket.device or lr.numel() != 1 or lr.requires_grad or lr.dtype not in (torch.float32, torch.float64)):
            return None
        if not on_device and not _is_number(lr):
            return None
        learning_rates.append(lr if on_device else None)
        table.extend((math.nan if on_device else float(lr), *map(float, others)))
    return table, learning_rates if any(lr is not None for lr in learning_rates) else []


def _state_of(bucket: Bucket, base: Optimizer, rule: Rule, rounding_key: int | None) -> StateTensors | None:
    """The options, and the state of every row that has a gradient; None if one of them has no complete state yet."""
    options = _options_of(bucket, base, rule)
    if options is None:
        return None
    names = [rule.state_names(group) for group in base.param_groups]
    found: dict[str, list[Tensor | None]] = {name: [None] * len(bucket.rows) for name in rule.all_names}
    for index, (row, group) in enumerate(zip(bucket.rows, bucket.groups, strict=True)):
        if row.grad is None:
            continue
        state = base.state.get(bucket.params[index][0], {})
        for name in names[group]:
            tensor = local_tensor(state.get(name))
            if not isinstance(tensor, Tensor):
                return None
            found[name][index] = tensor
    on_host = {step.device.type == "cpu" for step in found.get("step", ()) if step is not None}
    if len(on_host) > 1:
        return None
    device_steps = False in on_host
    if True in on_host and bucket.device.type == "cuda":
        base._cuda_graph_capture_health_check()  # a counter on the host would stand still in a graph: raises, as base.step() does
    table, learning_rates = options
    return StateTensors(found, table, learning_rates, device_steps, rounding_key)
