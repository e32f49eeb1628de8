"""``step(closure)``: which passes a closure computes, and whether the gradients that are there already are the first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

AUTO, BOTH, SECOND = "auto", "both", "second"

SPENT = "_sam_fast_spent"
"""Attribute of a gradient tensor: its version when it was last used or zeroed. A gradient that still has that version is not a new one."""

TAKEN = (
    "step(closure) found gradients and takes them for the first pass, as the reference implementation does; the closure is the second. "
    'If that is right, say SAM(..., closure="second"). If they are left over from something else, or accumulated over several batches, '
    'say SAM(..., closure="both"): they are then discarded and the closure is called for both passes. '
    "step(closure, passes=...) does the same for one call."
)

ACCUMULATED = (
    "Lightning has accumulated gradients over several batches before step(closure), and the closure computes the last batch only: SAM cannot take "
    "its second gradient on the same data. Use accumulate_grad_batches=1, or manual optimization: accumulate the first pass over all batches, "
    "first_step(), accumulate the second pass over the same batches, second_step()"
)


def check_closure_option(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` says which passes a closure computes."""
    if value not in (AUTO, BOTH, SECOND):
        raise ValueError(f'{name} must be "auto", "both" or "second", got {value!r}')


def mark_spent(gradients: Iterable[Tensor]) -> None:
    """Note that these gradients are no new ones until they change."""
    for grad in gradients:
        setattr(grad, SPENT, grad._version)


def are_new(gradients: Iterable[Tensor]) -> bool:
    """Whether there is a gradient that no step has used and nobody has zeroed through the optimizer."""
    return any(getattr(grad, SPENT, None) != grad._version for grad in gradients)


def warn_of_taken_gradients() -> None:
    warnings.warn(TAKEN, UserWarning, stacklevel=6)


def lightning_closure(closure: Callable[[], Any]) -> Any:
    """The closure of Lightning's automatic optimization that ``closure`` leads to, or None.

    It zeroes gradients itself where it does not add to those of earlier batches; then its ``_zero_grad_fn`` is None.
    """
    while isinstance(closure, partial) and closure.args:
        closure = closure.args[-1]
    return closure if hasattr(closure, "_zero_grad_fn") and hasattr(closure, "_step_fn") else None
