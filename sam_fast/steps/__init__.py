"""Base optimizers whose step is fused with the restore: one file each, and this list."""

from __future__ import annotations

from torch.optim import Optimizer

from .adam import AdamRule
from .rule import MissingState, NotFused, Rule
from .sgd import SgdRule

RULES: tuple[Rule, ...] = (SgdRule(), AdamRule())

_BY_CLASS = {cls: rule for rule in RULES for cls in rule.classes}


def class_name(base: Optimizer) -> str:
    """The qualified name of a base optimizer's class."""
    return f"{type(base).__module__}.{type(base).__qualname__}"


def rule_of(base: Optimizer) -> Rule | None:
    """How ``base`` steps, or None if its step is not fused. Nothing but its class decides, and no package is imported."""
    return _BY_CLASS.get(class_name(base))


def fused_classes() -> list[str]:
    """The names of the classes whose step is fused."""
    return [cls.rpartition(".")[2] for cls in _BY_CLASS]


__all__ = ["RULES", "MissingState", "NotFused", "Rule", "class_name", "fused_classes", "rule_of"]
