"""Keeps torch.compile out of the optimizer: a compiled training step then breaks its graph once per call of the
optimizer, instead of in many places inside it.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from pathlib import Path

TRACED = ("module_hooks",)
"""Modules that TorchDynamo must trace. Their hooks run inside models, whose graph would break at a hook it skips."""


@cache
def leave_uncompiled() -> None:
    """Have TorchDynamo skip the functions of this package, at no cost per call.

    Once is enough. Making an optimizer imports TorchDynamo anyway. A PyTorch without a list of modules to skip
    compiles what it can: compiling is slower, the results are the same.
    """
    try:
        from torch._dynamo.trace_rules import add
    except ImportError:
        return
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name not in TRACED:
            add(f"{__package__}.{module.name}")
