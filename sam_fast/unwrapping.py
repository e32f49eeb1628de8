"""Finds the SAM inside a framework's wrapper."""

from __future__ import annotations

from typing import Any

from .sam import SAM

INNER = ("_optimizer", "optimizer", "opt")
"""Attributes under which Lightning, Fabric, Accelerate, fastai and others keep the optimizer that they wrap."""


def unwrap(optimizer: Any) -> SAM:
    """The SAM optimizer inside a wrapper such as Accelerate's, Lightning's or Fabric's, or in a list.

    Args:
        optimizer: a SAM, an object that keeps one in ``optimizer``, ``_optimizer`` or ``opt``, or a list or tuple with
            one of these.

    Returns:
        The SAM itself, not a copy.

    Raises:
        TypeError: there is no SAM, or there are several in a list.
    """
    if isinstance(optimizer, (list, tuple)):
        found = [sam for sam in map(_inner, optimizer) if sam is not None]
        if len(found) != 1:
            raise TypeError(f"optimizer must hold one SAM, got a list with {len(found)} of them: pass one element")
        return found[0]
    sam = _inner(optimizer)
    if sam is None:
        raise TypeError(
            f"optimizer must be a sam_fast.SAM or an object with one inside, got {type(optimizer).__name__}: "
            "SAM(optimizer) makes one from a torch optimizer"
        )
    return sam


def _inner(optimizer: Any) -> SAM | None:
    """The innermost SAM, or None. A wrapper may itself be an instance of a class derived from SAM, as Lightning's is.
    And a SAM may have an attribute with one of these names that leads to no other.
    """
    seen: list[Any] = []
    sam = None
    while True:
        seen.append(optimizer)
        sam = optimizer if isinstance(optimizer, SAM) else sam
        attributes = getattr(optimizer, "__dict__", {})
        inner = next((attributes[name] for name in INNER if attributes.get(name) is not None), None)
        if inner is None or any(inner is known for known in seen):
            return sam
        optimizer = inner
