"""Copies numbers from the host to device memory, under CUDA graphs too, for kernels that read their tables there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..devices import is_capturing


class _Copies(NamedTuple):
    host: Tensor
    device: Tensor


class Upload:
    """8-byte numbers of the host in device memory. They are copied only if they are not those that were sent last.

    A graph replays its copies, from and to the memory that it was captured with. So nothing else writes to memory that
    a capture has used, and this object keeps it. If the numbers are those that an eager operation has sent last, a
    capture uses that memory and copies nothing. Otherwise it takes a spare pair, because pinned memory should not be
    allocated while a graph is captured.
    """

    SPARES = 2

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.uploads = 0
        self._captured = False
        self._sent: tuple[bytes, Tensor] | None = None  # valid for the operation that has begun
        self._eager: tuple[bytes, Tensor] | None = None  # None while it is not known what the device has
        self._memory: Tensor | None = None  # of eager operations
        self._spares: list[_Copies] = []
        self._kept: list[_Copies | Tensor] = []

    def begin(self) -> None:
        """Start an operation, or several that follow each other on the device: a graph must hold the copies that its
        kernels read.
        """
        self._captured = is_capturing(self.device)
        self._sent = None

    def send(self, numbers: bytes) -> Tensor:
        """An int64 tensor on the device with ``numbers``; they are valid for what is launched after this call."""
        if self._sent is None or self._sent[0] != numbers:
            self._sent = None  # if this is interrupted, it is not known what the device has
            with torch.inference_mode(False):
                self._sent = (numbers, self._send_captured(numbers) if self._captured else self._send(numbers))
        return self._sent[1]

    def _send(self, numbers: bytes) -> Tensor:
        if self._eager is not None and self._eager[0] == numbers:
            return self._eager[1]
        self._eager = None
        count = len(numbers) // 8
        if self._memory is None or self._memory.numel() != count:
            self._memory = self._new_device(count)
        # A new pinned tensor each time: an earlier copy may still be reading the last one. PyTorch reuses its memory
        # when that is done.
        self._copy(numbers, _Copies(self._new_host(count), self._memory))
        self._eager = (numbers, self._memory)
        if not self._spares or self._spares[0].device.numel() != count:
            self._spares.clear()
        while len(self._spares) < self.SPARES:
            self._spares.append(self._new(count))
        return self._memory

    def _send_captured(self, numbers: bytes) -> Tensor:
        if self._eager is not None and self._eager[0] == numbers:
            if self._memory is self._eager[1]:
                self._kept.append(self._memory)
                self._memory = None  # eager operations write elsewhere from now on
            return self._eager[1]
        count = len(numbers) // 8
        fits = bool(self._spares) and self._spares[-1].device.numel() == count
        copies = self._spares.pop() if fits else self._new(count)
        self._kept.append(copies)
        self._copy(numbers, copies)
        return copies.device

    def _copy(self, numbers: bytes, copies: _Copies) -> None:
        copies.host.copy_(torch.frombuffer(bytearray(numbers), dtype=torch.int64))
        copies.device.copy_(copies.host, non_blocking=True)
        self.uploads += 1

    def _new_host(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=self.device.type != "cpu")

    def _new(self, count: int) -> _Copies:
        return _Copies(self._new_host(count), self._new_device(count))

    def _new_device(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device=self.device)
