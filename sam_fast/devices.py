"""What the package asks of a device, of whatever kind. Public PyTorch functions only."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def devices_of(param_groups: Iterable[dict[str, Any]]) -> set[torch.device]:
    """The devices that parameters are on."""
    return {p.device for group in param_groups for p in group["params"]}


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """Launches, and questions about the current stream, go to the current device: makes it ``device``."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream records a graph rather than running what it is given."""
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "is_current_stream_capturing"):
        return False
    with made_current(device):
        return bool(module.is_current_stream_capturing())


def refuse_capture(device: torch.device, reason: str) -> None:
    """Raise RuntimeError with ``reason`` if a graph is being captured on ``device``."""
    if is_capturing(device):
        raise RuntimeError(f"this cannot be captured in a graph on {device}: {reason}")
