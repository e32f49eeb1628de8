"""torch.compile leaves the optimizer alone: a compiled training step breaks its graph once for a call of it, instead of
in many places inside.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

TRACED = ("module_hooks",)
"""What TorchDynamo has to see: hooks of models, whose graph a hook that it may not see would break."""

_done = False


def leave_uncompiled() -> None:
    """Have TorchDynamo skip the functions of this package, at no cost per call.

    Called when an optimizer is made, which imports TorchDynamo anyway. A PyTorch that knows no such list compiles what
    it can: slower to compile, with the same results.
    """
    global _done
    if _done:
        return
    _done = True
    try:
        from torch._dynamo import trace_rules
    except ImportError:
        return
    add: Any = getattr(trace_rules, "add", None)
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if add is not None else ():
        if module.name not in TRACED:
            add(f"{__package__}.{module.name}")
