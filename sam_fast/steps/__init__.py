"""Base optimizers whose step is fused with the restore: one file each, and this list."""

from __future__ import annotations

from torch.optim import Optimizer

from .adam import AdamRule, AdamWRule
from .lion import InterpolatedLionRule, LionRule
from .rule import MissingState, NotFused, Rule
from .sgd import SgdRule

RULES: tuple[Rule, ...] = (SgdRule(), AdamRule(), AdamWRule(), LionRule(), InterpolatedLionRule())


class _RuleOf(dict[type[Optimizer], Rule | None]):
    """Class of the base optimizer -> its rule, or None. The qualified name decides, so that no package is imported."""

    def __missing__(self, cls: type[Optimizer]) -> Rule | None:
        name = f"{cls.__module__}.{cls.__qualname__}"
        self[cls] = next((rule for rule in RULES if name in rule.classes), None)
        return self[cls]


RULE_OF = _RuleOf()


def fused_classes() -> list[str]:
    """The names of the classes whose step is fused."""
    return list(dict.fromkeys(cls.rpartition(".")[2] for rule in RULES for cls in rule.classes))


__all__ = ["RULES", "RULE_OF", "MissingState", "NotFused", "Rule", "fused_classes"]
