"""The cases of torch's tests of its own optimizers: ``OptimizerInfo`` from ``torch.testing._internal``, for each
optimizer that SAM takes as its base.
"""

from __future__ import annotations

import sys
import types
import unittest
from functools import cache
from typing import Any

import torch

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
