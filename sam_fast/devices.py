"""What the package asks of devices of any kind, through public PyTorch functions only."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def devices_of(param_groups: Iterable[dict[str, Any]]) -> set[torch.device]:
    """The devices that parameters are on."""
    return {p.device for group in param_groups for p in group["params"]}


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the current device, to which launches and questions about the current stream go."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()


def need_not_wait(device: torch.device) -> bool:
    """``non_blocking`` for a copy to ``device``: False for the host, which reads the copy at once."""
    return device.type != "cpu"


def can_capture(device: torch.device) -> bool:
    """Whether a device of this kind can capture graphs."""
    return hasattr(getattr(torch, device.type, None), "is_current_stream_capturing")


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream records a graph rather than running what it is given."""
    if not can_capture(device):
        return False
    with made_current(device):
        return bool(getattr(torch, device.type).is_current_stream_capturing())


def refuse_capture(device: torch.device, reason: str) -> None:
    """Raise RuntimeError with ``reason`` if a graph is being captured on ``device``."""
    if is_capturing(device):
        raise RuntimeError(f"this cannot be captured in a graph on {device}: {reason}")


def check_whole_step(recorded: bool | None, device: torch.device) -> None:
    """Raise RuntimeError if one half of a step is recorded in a graph and the other is not.

    ``recorded``: whether first_step was; None where the device knows by itself what has run.
    """
    if recorded is not None and recorded != is_capturing(device):
        raise RuntimeError(
            f"first_step() was {'' if recorded else 'not '}captured in a graph on {device}, and the end of its step "
            f"{'is not' if recorded else 'would be'}: capture whole steps. restore(), outside the capture, gives this "
            "step up"
        )


def never_ran(recorded: bool | None, device: torch.device) -> bool:
    """Whether the weights need not be put back, because first_step was only ``recorded`` in a graph whose capture ended
    before the step did. Warns in that case: if the graph is replayed all the same, it moves the weights.

    Raises:
        RuntimeError: putting them back would only be recorded.
    """
    if not recorded or is_capturing(device):
        check_whole_step(recorded, device)
        return False
    warnings.warn(
        f"first_step() was captured in a graph on {device}, and the end of its step was not: it has moved nothing, and "
        "nothing is put back. If that graph has been replayed, the weights are still perturbed",
        RuntimeWarning,
        stacklevel=2,
    )
    return True
