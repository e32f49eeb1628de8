"""One norm over buckets and devices: where the partial sums of squares are, and how they come together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NormSum:
    """The squared norm on one device: the partial sums of all its buckets side by side, then one number from each other device."""

    def __init__(self, device: torch.device, own: int, others: int) -> None:
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.own = own
        self.partials = torch.zeros(own + others, dtype=dtype, device=device)
        self.norm = torch.zeros((), dtype=dtype, device=device)

    def own_sum(self) -> Tensor:
        return self.partials[: self.own].sum()


def exchange_sums(sums: Sequence[NormSum]) -> None:
    """Make every device's partial sums complete: ``sum(partials)`` is then the squared norm over all devices, on each of them."""
    if len(sums) < 2:
        return
    totals = [s.own_sum() for s in sums]
    for receiver in sums:
        others = [total for s, total in zip(sums, totals, strict=True) if s is not receiver]
        for slot, total in enumerate(others, start=receiver.own):
            receiver.partials[slot].copy_(total, non_blocking=True)
