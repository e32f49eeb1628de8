"""One norm over buckets and devices: where the partial sums of squares are, and how they are combined."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .backends import Bucket
from .devices import need_not_wait


class NormSum:
    """The squared norm on one device: the partial sums of its buckets side by side, then a number per other device."""

    def __init__(self, device: torch.device, own: int, others: int) -> None:
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.own = own
        self.partials = torch.zeros(own + others, dtype=dtype, device=device)
        self.norm = torch.zeros((), dtype=dtype, device=device)

    @cached_property
    def total(self) -> Tensor:
        """Where the sum over all processes goes."""
        return self.partials[0]

    def own_sum(self) -> Tensor:
        return self.partials[: self.own].sum()

    def measured(self) -> Tensor:
        """The norm, once the partial sums are complete."""
        return self.partials.sum().sqrt()

    def measure(self) -> None:
        """Write the norm, for a device on which no bucket's perturb writes it."""
        self.norm.copy_(self.measured())


def exchange_sums(sums: Collection[NormSum]) -> None:
    """Make each device's partial sums complete: ``sum(partials)`` is then the squared norm over all devices."""
    if len(sums) < 2:
        return
    totals = [s.own_sum() for s in sums]
    for receiver in sums:
        others = [total for s, total in zip(sums, totals, strict=True) if s is not receiver]
        for slot, total in enumerate(others, start=receiver.own):
            receiver.partials[slot].copy_(total, non_blocking=need_not_wait(receiver.partials.device))


class Norm:
    """The norm over all buckets.

    ``parts`` has for each bucket the memory for its own partial sums, and the NormSum in which perturb finds all sums.

    Args:
        buckets: all buckets.
        process_wide: perturb finds the sum over all processes, one number per device.
        last: the norm over the buckets before these; its value stays until there is a new one.
    """

    def __init__(self, buckets: Sequence[Bucket] = (), process_wide: bool = False, last: Norm | None = None) -> None:
        counts: dict[torch.device, int] = {}
        starts = []
        for bucket in buckets:
            starts.append(counts.get(bucket.device, 0))
            counts[bucket.device] = starts[-1] + bucket.num_partials
        if process_wide:
            counts = dict.fromkeys(counts, 1)
        self._sums = {device: NormSum(device, own, len(counts) - 1) for device, own in counts.items()}
        self._first = next(iter(self._sums.values()), NormSum(torch.device("cpu"), 0, 0))
        for device, sums in self._sums.items():
            if last is not None and device in last._sums:
                sums.norm.copy_(last._sums[device].norm)
        self.parts: list[tuple[Bucket, Tensor, NormSum]] = []
        for bucket, start in zip(buckets, starts, strict=True):
            sums, n = self._sums[bucket.device], bucket.num_partials
            own = sums.partials.new_zeros(n) if process_wide else sums.partials[start : start + n]
            self.parts.append((bucket, own, sums))

    @property
    def value(self) -> Tensor:
        """The norm: 0-d, on the first bucket's device."""
        return self._first.norm

    def own_norm(self) -> Tensor:
        """The norm from the present partial sums on the first bucket's device, in a new tensor; :attr:`value` stays."""
        return self._first.measured()

    def exchange(self) -> None:
        """Make every device's partial sums complete."""
        exchange_sums(self._sums.values())
