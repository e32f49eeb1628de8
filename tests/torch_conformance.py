"""The cases of torch's tests of its own optimizers: ``OptimizerInfo`` from ``torch.testing._internal``, for each
optimizer that SAM takes as its base; and a step of SAM's and one of torch's that must end alike.
"""

from __future__ import annotations

import sys
import types
import unittest
from functools import cache
from typing import Any

import pytest
import torch
from cases import give
from torch import nn

from sam_fast import SAM

REFUSED = {
    "Adadelta": "has a rho of its own",
    "LBFGS": "needs a closure that it can call again",
    "SparseAdam": "takes sparse gradients only",
}
"""Optimizers that cannot be SAM's base, and why."""


@cache
def optimizer_infos() -> list[Any]:
    """torch's ``OptimizerInfo`` of every optimizer but those of ``REFUSED``.

    torch.testing imports expecttest, a package for tests of printed output, only to derive its TestCase from that
    one's. Where it is not installed unittest's stands in for it: nothing here runs such a test.
    """
    stands_in = False
    try:
        import expecttest  # noqa: F401
    except ImportError:
        module: Any = types.ModuleType("expecttest")
        module.TestCase, module.ACCEPT = unittest.TestCase, False
        sys.modules["expecttest"] = module
        stands_in = True
    frozen = torch.backends.flags_frozen()
    try:
        from torch.testing._internal.common_optimizers import optim_db
    finally:
        if stands_in:
            del sys.modules["expecttest"]
        # The import forbids setting torch.backends' flags outside of a context manager, for the rest of the process.
        vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = not frozen
    return [info for info in optim_db if info.name not in REFUSED]


BASES = [torch.optim.SGD, torch.optim.AdamW]
bases = pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)


def sam_step(optimizer: SAM, params: list[nn.Parameter], seed: int) -> None:
    """A first gradient that the result must not depend on, since w comes back; then the second."""
    give(params, 1000 + seed)
    optimizer.first_step()
    give(params, seed)
    optimizer.second_step()


def plain_step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int) -> None:
    give(params, seed)
    optimizer.step()
