"""Base optimizers whose step is fused with the restore: one file each, and this list."""

from __future__ import annotations

from functools import cache

from torch.optim import Optimizer

from .adam import AdamRule, AdamWRule
from .lion import InterpolatedLionRule, LionRule
from .rule import MissingState, NotFused, Rule, wrong_state
from .sgd import SgdRule

RULES: tuple[Rule, ...] = (SgdRule(), AdamRule(), AdamWRule(), LionRule(), InterpolatedLionRule())


@cache
def rule_of(cls: type[Optimizer]) -> Rule | None:
    """How a class of base optimizers steps, if a rule says. The qualified name decides: no package is imported."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    return next((rule for rule in RULES if name in rule.classes), None)


def fused_classes() -> list[str]:
    """The names of the classes whose step is fused."""
    return list(dict.fromkeys(cls.rpartition(".")[2] for rule in RULES for cls in rule.classes))


__all__ = ["RULES", "MissingState", "NotFused", "Rule", "fused_classes", "rule_of", "wrong_state"]
