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
from itertools import repeat
from operator import is_, is_not
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .amp import Scaling
from .backends.base import StateTensors
from .bucket import Bucket
from .devices import refuse_capture
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

    @abstractmethod
    def first_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor] | None:
        """The state with which the kernel's step is a parameter's first, as PyTorch takes it. None if there is no such."""

    all_names: tuple[str, ...]


class SgdRule(Rule):
    operation = "restore_sgd"
    all_names = ("momentum_buffer",)

    def options(self, group: dict[str, Any]) -> list[Any]:
        return [group["lr"], group["momentum"], group["dampening"], group["weight_decay"], group["nesterov"], group["maximize"]]

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def first_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor] | None:
        # PyTorch makes the first gradient the buffer, without dampening. momentum * -0.0 + g has the bits of g, the sign of 0 included.
        return None if group["dampening"] != 0 else {"momentum_buffer": torch.full_like(param, -0.0, requires_grad=False)}


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

    def first_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor] | None:
        if group.get("capturable") or group.get("fused"):
            local = local_tensor(param)
            wide = not group.get("fused") and torch.get_default_dtype() == torch.float64
            step = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=local.device)
        else:
            step = torch.tensor(0.0, dtype=torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32, device="cpu")
        moments = {name: torch.zeros_like(param, requires_grad=False) for name in self.state_names(group) if name != "step"}
        return {"step": step, **moments}


RULES: dict[type[Optimizer], Rule] = {
    torch.optim.SGD: SgdRule(),
    torch.optim.Adam: AdamRule(decoupled=False),
    torch.optim.AdamW: AdamRule(decoupled=True),
}
"""Exact class of the base optimizer -> its rule."""


def fused_step(perturbation: Perturbation, base: Optimizer, scaling: Scaling, rounding_key: int | None = None) -> str | None:
    """Restore the weights and take the base optimizer's step in one pass. The reason if that cannot be done: then nothing has been changed.

    Args:
        perturbation: the weights are at ``w + e``; afterwards they are not.
        base: the base optimizer, whose options and state are used.
        scaling: what a GradScaler has done to the gradients. They stay scaled, unlike after the base optimizer's own step.
        rounding_key: that of the new weights' stochastic rounding (:mod:`sam_fast.rounding`), or None.
    """
    rule = RULES.get(type(base))
    if rule is None:
        return f"{type(base).__qualname__} is not one of {', '.join(cls.__qualname__ for cls in RULES)}"
    reason = _watched_by(base)
    if reason is not None:
        return reason
    buckets = perturbation.step_buckets() if perturbation.fits(base.param_groups) else None
    if buckets is None:
        return "parameters or groups are no longer those of first_step, or have left their flat buffer"
    ready = _on_host(scaling, buckets)
    if isinstance(ready, str):
        return ready
    with perturbation.own_step_grads() as known:
        if not known:
            return "a DTensor's gradient is not placed as the parameter is"
        # A gradient's Python object is made anew whenever nobody holds it.
        grads = [list(map(_grad_of, bucket.rows)) for bucket in buckets]
        states = []
        for bucket, its_grads in zip(buckets, grads, strict=True):
            # Where it is not known yet whether there is a step, none must leave a state behind.
            state = _state_of(bucket, base, rule, rounding_key, its_grads, may_make=ready.found_inf is None)
            if isinstance(state, str):
                return state
            if ready.found_inf is not None and "step" in state.tensors and not state.device_steps:
                return (
                    "step counters on the host have to know beforehand whether gradients overflowed: fused=True or capturable=True keeps them there"
                )
            states.append(state)
        if not all(bucket.backend.collect_step(bucket, state) for bucket, state in zip(buckets, states, strict=True)):
            return "a parameter, gradient or state is not laid out as the parameter was in first_step"
        reason = perturbation.why_not_fused()
        if reason is not None:
            return reason
        stepped = [p for bucket, its_grads in zip(buckets, grads, strict=True) for p in _params_with(bucket, its_grads)]
        perturbation.restore_and_step(rule.operation, buckets, states, ready, stepped)
    for bucket, state in zip(buckets, states, strict=True):
        if bucket.backend.steps_empty_rows:
            continue
        steps = state.tensors.get("step")
        for row in bucket.empty_rows if steps is not None and not state.device_steps else ():
            step = steps[row]  # type: ignore[index]
            if step is not None:
                step += 1  # the kernels never come to a row without elements
    if "step" in vars(base):
        base._opt_called = True  # type: ignore[attr-defined]  # what the wrapped step would have noted
    return None


def _on_host(scaling: Scaling, buckets: Sequence[Bucket]) -> Scaling | str:
    """The scaling as the kernels take it: what is on the host is decided here. The reason if there must be no step, or if the base must see to it."""
    if scaling.grad_scale is not None and any(bucket.dtype == torch.float16 for bucket in buckets):
        return "scaled gradients in float16"  # refused, see amp.step_base
    if scaling.found_inf is None:
        return scaling
    if scaling.found_inf.device.type == "cpu":
        return "gradients are not finite: no step" if float(scaling.found_inf) != 0.0 else Scaling(scaling.grad_scale, None)
    if not all(bucket.backend.decides_on_device for bucket in buckets):
        return "the backend cannot decide on the device whether gradients overflowed"
    return scaling


WRAPPED_BY_SCHEDULER = "_wrapped_by_lr_sched"
"""Attribute of a ``step`` that a learning rate scheduler has put on its optimizer, only to note that it was called."""


def _watched_by(base: Optimizer) -> str | None:
    """Who must see ``base.step()`` being called, or None. Global hooks are not asked: they see SAM's own step."""
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return "the base optimizer has step hooks of its own: register them on SAM"
    step = vars(base).get("step")
    if step is not None and not hasattr(step, WRAPPED_BY_SCHEDULER):
        return "the base optimizer's step was replaced"
    return None


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.device.type == "cpu" and not value.requires_grad
    return isinstance(value, (int, float))


def _is_on(value: Tensor, device: torch.device) -> bool:
    return value.device == device and value.numel() == 1 and not value.requires_grad and value.dtype in (torch.float32, torch.float64)


def _options_of(bucket: Bucket, base: Optimizer, rule: Rule) -> tuple[array[float], list[Tensor | None]] | str:
    """The table of all groups' options, and the learning rates that are on the bucket's device; the reason if a kernel cannot take one."""
    table = array("d")
    learning_rates: list[Tensor | None] = []
    present = set(bucket.groups)
    for index, group in enumerate(base.param_groups):
        lr, *others = rule.options(group)
        if index not in present:
            learning_rates.append(None)
            table.extend([math.nan] * (1 + len(others)))
            continue
        if group.get("differentiable"):
            return "differentiable=True"
        if group.get("capturable") and bucket.device.type == "cpu":
            return "capturable=True with parameters on the CPU"
        if not all(map(_is_number, others)):
            return "an option is a tensor that a kernel cannot read"
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        fits = _is_on(lr, bucket.device) if on_device else _is_number(lr)
        if not fits:
            return "a learning rate is a tensor that a kernel cannot read"
        learning_rates.append(lr if on_device else None)
        table.extend((math.nan if on_device else float(lr), *map(float, others)))
    return table, learning_rates if any(lr is not None for lr in learning_rates) else []


class _Columns:
    """The base optimizer's state of a bucket's rows: for each name a column with a tensor, or None, for each row."""

    def __init__(self, tensors: dict[str, list[Any]]) -> None:
        self.tensors = tensors
        self.right = all(tensor is None or isinstance(tensor, Tensor) for column in tensors.values() for tensor in column)
        on_host = {step.device.type == "cpu" for step in tensors.get("step", ()) if step is not None} if self.right else set()
        self.right = self.right and len(on_host) < 2
        self.device_steps = False in on_host
        self.host_steps = True in on_host

    def same(self, tensors: dict[str, list[Any]]) -> bool:
        return self.tensors.keys() == tensors.keys() and all(
            len(column) == len(tensors[name]) and all(map(is_, column, tensors[name])) for name, column in self.tensors.items()
        )


class _Memory:
    """What the last step has seen of the base optimizer's state, kept as the bucket's ``step_memory``.

    Looking at ten thousand tensors takes longer than the kernels do, and the hash of each parameter is a call into Python. Seeing that they are
    still the same, in the same order, is neither.
    """

    def __init__(self, bucket: Bucket, base: Optimizer) -> None:
        self.keys = list(base.state)
        place = {id(p): index for index, p in enumerate(self.keys)}
        self.places = [place.get(id(p), len(self.keys)) for p in bucket.owners]
        self.columns: _Columns | None = None

    def fits(self, base: Optimizer) -> bool:
        return len(base.state) == len(self.keys) and all(map(is_, base.state, self.keys))

    def states(self, base: Optimizer) -> list[dict[str, Any] | None]:
        """For each row its parameter's state, None where it has none."""
        values = [*base.state.values(), None]
        return [values[place] for place in self.places]


def _memory_of(bucket: Bucket, base: Optimizer) -> _Memory:
    memory: _Memory | None = bucket.step_memory
    if memory is None or not memory.fits(base):
        memory = bucket.step_memory = _Memory(bucket, base)
    return memory


def _make_first_states(bucket: Bucket, base: Optimizer, rule: Rule, names: list[tuple[str, ...]], grads: list[Tensor | None]) -> bool:
    """Make the state of rows that take their first step, beside entries that are not the base optimizer's. Whether there were such rows.

    A row that has some of the names but not all is left to the base optimizer, as is one that the kernel cannot take a first step with.
    """
    made = False
    for p, grad, group in zip(bucket.owners, grads, bucket.groups, strict=True):
        if grad is not None and names[group] and base.state.get(p, {}).keys().isdisjoint(rule.all_names):
            first = rule.first_state(p, base.param_groups[group])
            if first is not None:
                base.state[p].update(first)
                made = True
    return made


def _columns_of(bucket: Bucket, base: Optimizer, rule: Rule, grads: list[Tensor | None], may_make: bool) -> _Columns | str:
    """The state of every row that has a gradient; the reason if one of them has no complete state yet. ``may_make``: or it is made."""
    names = [rule.state_names(group) for group in base.param_groups]
    memory = _memory_of(bucket, base)
    found = _complete_state(bucket, memory.states(base), rule, names, grads)
    if isinstance(found, str) and may_make and _make_first_states(bucket, base, rule, names, grads):
        memory = _memory_of(bucket, base)
        found = _complete_state(bucket, memory.states(base), rule, names, grads)
    if isinstance(found, str):
        return found
    columns = memory.columns
    if columns is None or not columns.same(found):
        # A DTensor stays the same object while what this process holds of it changes: never the same as its local tensor.
        columns = memory.columns = _Columns({name: list(map(local_tensor, column)) for name, column in found.items()})
    return columns if columns.right else "the base optimizer's state is not as PyTorch makes it"


def _complete_state(
    bucket: Bucket, states: list[dict[str, Any] | None], rule: Rule, names: list[tuple[str, ...]], grads: list[Tensor | None]
) -> dict[str, list[Any]] | str:
    """For each name the state of the rows that have a gradient, None for the others; the reason if one of them lacks it."""
    every_row = _count(states) == _count(grads) == len(grads)
    found: dict[str, list[Any]] = {}
    for name in rule.all_names:
        takes = [name in of_group for of_group in names]
        if every_row and all(takes):
            column = [state.get(name) for state in states]  # type: ignore[union-attr]
            wanted = len(grads)
        else:
            takers = [grad is not None and takes[group] for grad, group in zip(grads, bucket.groups, strict=True)]
            column = [state.get(name) if takes_it and state is not None else None for state, takes_it in zip(states, takers, strict=True)]
            wanted = sum(takers)
        if _count(column) != wanted:
            return f"the base optimizer has yet to make the state {name!r} of a parameter"
        found[name] = column
    return found


_grad_of = Tensor.grad.__get__  # type: ignore[union-attr]  # without the search for the attribute


def _params_with(bucket: Bucket, grads: list[Tensor | None]) -> list[Tensor]:
    """The parameters of the rows that have a gradient."""
    if _count(grads) == len(grads):
        return bucket.all_params
    return [p for params, grad in zip(bucket.params, grads, strict=True) if grad is not None for p in params]


def _count(items: list[Any]) -> int:
    """How many are not None."""
    return sum(map(is_not, items, repeat(None)))


def _state_of(
    bucket: Bucket, base: Optimizer, rule: Rule, rounding_key: int | None, grads: list[Tensor | None], may_make: bool
) -> StateTensors | str:
    """The options, and the state of every row that has a gradient; the reason if a kernel cannot take it."""
    if rule.operation not in bucket.backend.fused_steps:
        return f"the {bucket.backend.name} backend has no {rule.operation}"
    options = _options_of(bucket, base, rule)
    if isinstance(options, str):
        return options
    columns = _columns_of(bucket, base, rule, grads, may_make)
    if isinstance(columns, str):
        return columns
    if columns.host_steps:
        refuse_capture(bucket.device, "Adam's step counters are on the host, where they stand still in a graph. Use the option capturable=True")
    table, learning_rates = options
    return StateTensors(columns.tensors, table, learning_rates, columns.device_steps, rounding_key)
