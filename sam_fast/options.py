"""What SAM is given: parameters, options, a base optimizer, a state dict. Checked and brought into the form that the rest expects."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

OPTIONS = ("rho", "adaptive", "eta", "perturb")
"""The options that SAM adds to every parameter group."""

OLD_WEIGHTS = "old_p"
"""Where the reference implementation keeps its backup, in the state that it saves."""


def without_old_weights(state: dict[Any, Any]) -> dict[Any, Any]:
    """The state of a reference implementation's checkpoint, without the copy of the weights in it."""
    if not any(OLD_WEIGHTS in entry for entry in state.values() if isinstance(entry, dict)):
        return state
    warnings.warn(
        "this checkpoint is the reference implementation's, which saves no state of the base optimizer: its momentum starts anew",
        UserWarning,
        stacklevel=3,
    )
    kept = {key: {name: value for name, value in entry.items() if name != OLD_WEIGHTS} for key, entry in state.items()}
    return {key: entry for key, entry in kept.items() if entry}


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """The parameter groups, as new dictionaries."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, named tensors or parameter groups, got a tensor: wrap it in a list")
    entries = list(params)
    if not entries:
        raise ValueError("params is empty: SAM got no parameters to optimize")
    if isinstance(entries[0], dict):
        return [dict(group) for group in entries]
    return [{"params": entries}]


def check_options(group: dict[str, Any]) -> None:
    """Raise ValueError if an option of a group is out of range."""
    for name in ("rho", "eta"):
        if name in group:
            check_at_least_zero(name, group[name])


def check_at_least_zero(name: str, value: Any) -> None:
    """Raise ValueError if the option ``name`` is not a finite number of at least 0."""
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_base(base: Any) -> None:
    """Raise TypeError or ValueError if ``base`` cannot be a base optimizer."""
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must return a torch.optim.Optimizer, got {type(base).__name__}")
    collisions = [name for name in OPTIONS if name in base.defaults]
    if collisions:
        raise ValueError(
            f"{type(base).__name__} has options of its own with the names of SAM's ({', '.join(collisions)}): "
            "one group entry cannot hold both, so it cannot be SAM's base optimizer"
        )
    if getattr(base, "_overlap_with_ddp", False):
        name = type(base).__name__
        raise ValueError(f"{name} with overlap_with_ddp=True steps in the middle of every backward pass, SAM's first as well: leave it out")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{type(base).__name__}.step needs a closure to evaluate the loss again: it cannot be SAM's base optimizer")
