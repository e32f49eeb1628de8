"""The second step in one pass: put the weights back and step as the base optimizer does, where a rule says how.

The state stays the base optimizer's own, in its format, so that checkpoints move freely between SAM(AdamW) and AdamW.
Whatever a kernel does not do goes through ``restore`` and ``base_optimizer.step()``: other optimizers and their
subclasses, hooks, ``differentiable=True``, and first steps that a rule knows no state for.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .amp import UNSCALED, Scaling
from .backends import Bucket, StepOptions
from .base_step import has_hooks, is_scheduler_wrapper
from .devices import refuse_capture
from .perturbation import Perturbation
from .steps import MissingState, NotFused, Rule, fused_classes, rule_of


def fused_step(
    perturbation: Perturbation, base: Optimizer, scaling: Scaling, rounding_key: int | None = None
) -> str | None:
    """Restore the weights and take the base optimizer's step in one pass.

    Args:
        perturbation: that of the weights at ``w + e``; no longer active afterwards.
        base: the base optimizer, whose options and state are used.
        scaling: what a GradScaler has done to the gradients. They stay scaled, unlike after the base optimizer's step.
        rounding_key: the key of the new weights' stochastic rounding (:mod:`sam_fast.rounding`), or None.

    Returns:
        None if it was done; else the reason why not, and the weights have not changed.
    """
    try:
        rule = _rule_for(base)
        buckets = perturbation.step_buckets(base.param_groups)
        if scaling is not UNSCALED:
            scaling = _on_host(scaling, buckets)
        options = []
        for bucket in buckets:
            of_bucket = _options_of(bucket, base, rule, rounding_key)
            # While it is unknown whether there will be a step, no state is made: a skipped step must not leave one.
            _prepare(bucket, base, of_bucket, may_make=scaling.found_inf is None)
            if bucket.host_counters or rule.group_counter is not None:
                _check_host_counters(bucket, scaling)
            options.append(of_bucket)
        perturbation.check_step()
    except NotFused as reason:
        return str(reason)
    perturbation.restore_and_step(buckets, options, scaling)
    if rule.group_counter is not None:
        for group in base.param_groups:
            group[rule.group_counter] = group.get(rule.group_counter, 0) + 1
    if "step" in vars(base):
        base._opt_called = True  # type: ignore[attr-defined]  # as the scheduler's wrapper would have
    return None


def _rule_for(base: Optimizer) -> Rule:
    """How ``base`` steps. Raises NotFused if there is no rule, or if somebody must see ``base.step()`` being called.

    Global hooks are not asked: they see SAM's own step.
    """
    cls: Any = type(base)  # to mypy, no class is hashable
    rule = rule_of(cls)
    if rule is None:
        raise NotFused(f"{cls.__qualname__} is not one of {', '.join(fused_classes())}")
    if has_hooks(base):
        raise NotFused("the base optimizer has step hooks of its own: register them on SAM")
    if "step" in vars(base) and not is_scheduler_wrapper(vars(base)["step"], base):
        raise NotFused("the base optimizer's step was replaced")
    if not _is_own_step(cls, cls.step):
        raise NotFused(f"{cls.__qualname__}.step was replaced")
    return rule


@lru_cache(maxsize=64)
def _is_own_step(cls: Any, step: Any) -> bool:
    """Whether a class's ``step`` is what it or a base class defines, in no wrappers but PyTorch's."""
    while (inner := getattr(step, "__wrapped__", None)) is not None:
        if not getattr(step, "__globals__", {}).get("__name__", "").startswith("torch."):
            return False
        step = inner
    return any(getattr(step, "__qualname__", "") == f"{c.__qualname__}.step" for c in cls.__mro__)


def _on_host(scaling: Scaling, buckets: Sequence[Bucket]) -> Scaling:
    """The scaling as the kernels take it: a ``found_inf`` on the host is decided here.

    Raises NotFused if there must be no step, or if the base optimizer has to decide.
    """
    if scaling.grad_scale is not None and any(bucket.dtype == torch.float16 for bucket in buckets):
        raise NotFused("scaled gradients in float16")  # refused, see amp.step_base
    if scaling.found_inf is None:
        return scaling
    if scaling.found_inf.device.type == "cpu":
        if float(scaling.found_inf) != 0.0:
            raise NotFused("gradients are not finite: no step")
        return Scaling(scaling.grad_scale, None)
    if not all(bucket.decides_on_device for bucket in buckets):
        raise NotFused("the backend cannot decide on the device whether gradients overflowed")
    return scaling


def _check_host_counters(bucket: Bucket, scaling: Scaling) -> None:
    """Raise NotFused if step counters are on the host and the device decides whether there is a step."""
    if scaling.found_inf is not None:
        raise NotFused(
            "step counters on the host have to know beforehand whether gradients overflowed: fused=True or "
            "capturable=True keeps them on the device"
        )
    if bucket.device.type != "cpu":
        refuse_capture(
            bucket.device,
            "step counters are on the host, where they stand still in a graph. Use the option capturable=True",
        )


# ---- Options ---------------------------------------------------------------------------------------------------------


def _options_of(bucket: Bucket, base: Optimizer, rule: Rule, rounding_key: int | None) -> StepOptions:
    """The options of all groups; those of the step before where nothing has changed since.

    Raises NotFused if a kernel cannot take one.
    """
    given = [
        (*rule.values(group, base), group.get("differentiable", False), group.get("capturable", False))
        for group in base.param_groups
    ]
    plain = all(type(value) in (float, int, bool) for group in given for value in group)  # no tensors to compare
    known = bucket.step_options
    if not plain or known is None or known.given != given or known.rule is not rule:
        known = bucket.step_options = _new_options(bucket, base, rule, given if plain else [])
    known.rounding_key = rounding_key
    return known


def _new_options(bucket: Bucket, base: Optimizer, rule: Rule, given: list[tuple[Any, ...]]) -> StepOptions:
    if rule.name not in bucket.steps:
        raise NotFused(f"the {bucket.backend} backend has no fused step of {type(base).__qualname__}")
    values, masks = array("d"), array("Q")
    learning_rates: list[Tensor | None] = []
    present = set(bucket.groups)
    for index, group in enumerate(base.param_groups):
        takes = rule.takes(group)
        masks.append(sum(1 << k for k, name in enumerate(rule.all_names) if name in takes))
        if index not in present:
            learning_rates.append(None)
            values.extend([math.nan] * len(rule.options))
            continue
        lr, numbers = None, rule.values(group, base)
        if isinstance(numbers[0], Tensor) and numbers[0].device.type != "cpu":
            lr, numbers[0] = numbers[0], math.nan
        _check_group(bucket, group, lr, numbers)
        learning_rates.append(lr)
        values.extend(map(float, numbers))
    on_device = any(lr is not None for lr in learning_rates)
    return StepOptions(rule, values, masks, learning_rates if on_device else [], given=given)


def _check_group(bucket: Bucket, group: dict[str, Any], lr: Tensor | None, on_host: list[Any]) -> None:
    """Raise NotFused if a kernel cannot take the options of a group. ``lr``: its learning rate if it is on a device."""
    if group.get("differentiable"):
        raise NotFused("differentiable=True")
    if group.get("capturable") and bucket.device.type == "cpu":
        raise NotFused("capturable=True with parameters on the CPU")
    if lr is not None and not _is_on(lr, bucket.device):
        raise NotFused("a learning rate is a tensor that a kernel cannot read")
    if not all(map(_is_number, on_host)):
        raise NotFused("an option is a tensor that a kernel cannot read")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.device.type == "cpu" and not value.requires_grad
    return isinstance(value, (int, float))


def _is_on(value: Tensor, device: torch.device) -> bool:
    is_scalar = value.numel() == 1 and value.dtype in (torch.float32, torch.float64)
    return value.device == device and is_scalar and not value.requires_grad


# ---- State -----------------------------------------------------------------------------------------------------------


def _prepare(bucket: Bucket, base: Optimizer, options: StepOptions, may_make: bool) -> None:
    """Have the bucket look up everything; with ``may_make`` state is made where it is missing."""
    try:
        bucket.prepare_step(base.state, options)
    except MissingState:
        if not (may_make and _make_first_states(bucket, base, options.rule)):
            raise
        bucket.prepare_step(base.state, options)


def _make_first_states(bucket: Bucket, base: Optimizer, rule: Rule) -> bool:
    """Make the state of parameters that take their first step. Entries that are not the base optimizer's stay.

    A parameter that has some of the states but not all is left to the base optimizer, as is one that the kernel cannot
    take a first step with. Returns whether any was made.
    """
    refuse_capture(
        bucket.device,
        "the base optimizer has yet to make its state, which replays would make anew. Take a few eager steps first",
    )
    made = False
    indices = bucket.with_gradient()
    for index in range(len(bucket.tensors)) if indices is None else indices:
        param, group = bucket.sources[index], base.param_groups[bucket.groups[index]]
        if rule.takes(group) and base.state.get(param, {}).keys().isdisjoint(rule.all_names):
            first = rule.first_state(param, group)
            if first is not None:
                base.state[param].update(first)
                made = True
    return made
