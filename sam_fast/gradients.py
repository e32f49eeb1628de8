"""Which gradients a backward pass has left: those that nobody has used or zeroed since."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

USED = "_sam_fast_spent"
"""Attribute of a gradient tensor: its version when it was last used or zeroed.

A gradient that still has that version is not a new one.
"""

BEFORE = "_sam_fast_before"
"""Likewise: its version when BatchNorm layers that it comes from were disabled."""


def mark_used(gradients: Iterable[Tensor], mark: str = USED) -> None:
    """Note that these gradients are not new until they change."""
    for grad in gradients:
        setattr(grad, mark, _version(grad))


def are_new(gradients: Iterable[Tensor], mark: str = USED) -> bool:
    """Whether there is a gradient that no step has used and nobody has zeroed through the optimizer."""
    return any(getattr(grad, mark, None) != _version(grad) for grad in gradients)


def _version(grad: Tensor) -> int:
    """How often a gradient has been written."""
    try:
        return grad._version
    except RuntimeError:  # an inference tensor: a gradient that was estimated without a backward pass
        return 0


def all_zero(gradients: Iterable[Tensor]) -> bool:
    """Whether every element of every gradient is zero. The host reads them, the small ones first: after a backward pass
    one of these is most likely not zero, and large ones, such as an embedding's, need not be read.
    """
    return not any(grad.any() for grad in sorted(gradients, key=Tensor.numel))


def left_by_a_pass(gradients: Iterable[Tensor]) -> bool:
    """Whether a pass has left gradients: they are new, and not all zero, as they would be after
    ``model.zero_grad(set_to_none=False)``. If there are new ones, the host reads their values.
    """
    gradients = list(gradients)
    return are_new(gradients) and not all_zero(gradients)
