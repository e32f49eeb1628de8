"""Directions of the perturbation other than this batch's gradient, which cost no pass of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .backends import Bucket
from .backends.columns import local_tensor
from .storage import InPlace

Columns = list[list[Tensor | None]]
"""For each bucket a direction, or None, for each of its tensors."""

GRADIENT, PREVIOUS = "gradient", "previous"

CHANGED = (
    'along="previous": gradients were changed in place after the step that was made with them, and are no direction '
    "for their parameters any more. Call optimizer.zero_grad() rather than the model's, with set_to_none=True"
)


class PreviousGradient:
    """The gradient that the last step was made with (AsyncSAM, https://arxiv.org/abs/2503.11147).

    The gradients are kept as they are: ``zero_grad`` lets go of them, and nobody writes them any more. They are copied
    where they are about to be zeroed in place, and with ``flatten=True``.

    There is no direction before the first step, nor after a resume: it is in no checkpoint.
    """

    def __init__(self) -> None:
        self._kept: dict[Tensor, tuple[Tensor, int]] = {}  # by parameter: its gradient, and the version that counts
        self._warned = False

    def keep(self, param_groups: Iterable[dict[str, Any]], copied: bool) -> None:
        """Keep the gradients that a step was made with; ``copied``: their memory is used again."""
        grads = ((p, p.grad) for group in param_groups for p in group["params"] if p.grad is not None)
        found = ((p, grad.detach().clone() if copied else grad) for p, grad in grads)
        self._kept = {p: (grad, _version(grad)) for p, grad in found}

    def forget(self) -> None:
        """There is no direction any more."""
        self._kept = {}

    def copy_before_zeroing(self) -> None:
        """Gradients are about to be zeroed in place."""
        for p, (grad, version) in self._kept.items():
            if grad is p.grad and version == _version(grad):
                copy = grad.detach().clone()
                self._kept[p] = (copy, _version(copy))

    def columns(self, buckets: Sequence[Bucket], storage: InPlace) -> Columns | None:
        """The direction of each bucket's tensors; None if there is none."""
        intact = {p: grad for p, (grad, version) in self._kept.items() if version == _version(grad)}
        if len(intact) < len(self._kept) and not self._warned:
            self._warned = True
            warnings.warn(CHANGED, RuntimeWarning, stacklevel=2)
        directions = {p: grad for p, grad in intact.items() if p.requires_grad}
        return storage.columns(buckets, directions.get) if directions else None


def _version(grad: Tensor) -> int:
    return int(local_tensor(grad)._version)


def direction(along: str) -> PreviousGradient | None:
    """What ``along`` means: an object, or None for this batch's gradient.

    Raises:
        ValueError: it is unknown.
    """
    if along not in (GRADIENT, PREVIOUS):
        raise ValueError(f'along must be "{GRADIENT}" or "{PREVIOUS}", got {along!r}')
    return PreviousGradient() if along == PREVIOUS else None
