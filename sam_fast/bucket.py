"""Flattened parameter buckets: one flat index space over tensors of one device and dtype.

A bucket has *rows*, the tensors that the kernels walk. By default a row is a parameter where it lies; with ``flatten=True`` a row is one
group's run of a flat buffer (see :mod:`sam_fast.flat`). Every row has a *slot* in the bucket's index space, padded so that each slot starts on
a 64-byte boundary, and the rows are cut into *chunks*, so that one launch serves rows of every size, of all parameter groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from .backends.base import Backend

ALIGNMENT = 64
"""Bytes. A cache line, and the widest vector of any CPU: slots never share a line and streaming stores are always aligned."""

CHUNK = 16384
"""Elements. Small enough to balance over threads, large enough that the per-chunk work vanishes. A multiple of ALIGNMENT for every dtype."""


@cache
def is_wrapper(cls: type[Tensor]) -> bool:
    """True for a subclass whose elements lie elsewhere, or are not what its memory holds: DTensor, quantised tensors."""
    return cls.__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_plain(tensor: Tensor) -> bool:
    """True if the tensor's elements lie in strided memory of its own. Nothing else is asked of a tensor for which it is False."""
    if is_wrapper(type(tensor)) or is_lazy(tensor):
        return False
    return tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_nested


def is_dense(tensor: Tensor) -> bool:
    """True if ``tensor`` covers its memory without gaps or overlaps, in whatever order of dimensions (so channels_last is dense)."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def overlapping(tensors: Sequence[Tensor]) -> set[int]:
    """The indices of the tensors whose memory reaches into that of another one of the same device."""
    spans = sorted(
        (str(t.device), t.data_ptr(), t.data_ptr() + (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size(), i)
        for i, t in enumerate(tensors)
        if is_plain(t) and t.numel() > 0
    )
    found: set[int] = set()
    furthest: tuple[str, int, int] | None = None  # device, end and index of the span that reaches furthest so far
    for device, begin, end, index in spans:
        if furthest is not None and furthest[0] == device and begin < furthest[1]:
            found |= {furthest[2], index}
        if furthest is None or furthest[0] != device or end > furthest[1]:
            furthest = (device, end, index)
    return found


def padded_size(numel: int, itemsize: int) -> int:
    """``numel`` rounded up to whole 64-byte lines of elements of ``itemsize`` bytes."""
    line = max(1, ALIGNMENT // itemsize)
    return -(-numel // line) * line


class Bucket:
    """Rows of one device and dtype, in one flat index space, with the storage for their backup.

    Args:
        rows: strided tensors of one device and dtype.
        groups: for each row the index of its parameter group; ascending.
        backend: the kernels that serve the bucket. Its ``attach`` adds ``table``, whatever that backend needs to find the rows.
        params: for each row the parameters it stands for; by default the row itself. Their version counters follow the row's.
        backup: another bucket with the same elements in the same slots, whose backup is this one's too.
        shared: rows may share memory with each other: they must be moved one after the other.
    """

    def __init__(
        self,
        rows: Sequence[Tensor],
        groups: Sequence[int],
        backend: Backend,
        params: Sequence[list[Tensor]] | None = None,
        backup: Bucket | None = None,
        shared: bool = False,
    ) -> None:
        self.rows = list(rows)
        self.groups = list(groups)
        self.backend = backend
        self.device = rows[0].device
        self.dtype = rows[0].dtype
        self.slots: list[int] = []
        self.numel = 0
        for row in self.rows:
            self.slots.append(self.numel)
            self.numel += padded_size(row.numel(), row.element_size())
        # As they are now: a row that changes later must not change what its backup looks like.
        self._layouts = [dense_layout(row) for row in self.rows]
        self.params = [[row] for row in self.rows] if params is None else list(params)
        self.all_params = [p for row in self.params for p in row]
        self.owners = [params[0] for params in self.params]
        self.empty_rows = [index for index, row in enumerate(self.rows) if row.numel() == 0]
        self._backup = backup
        self.shared = shared
        self.step_memory: Any = None  # see fused_step
        self.table: Any = backend.attach(self)

    @cached_property
    def chunks(self) -> Tensor:
        """int64 tensor ``[num_chunks, 5]`` on the CPU: row, group, first element in the row, count, first element in the flat index space.

        The layout is that of ``struct Chunk`` in csrc/table.h. Slots ascend.
        """
        entries = []
        for index, (row, group, slot) in enumerate(zip(self.rows, self.groups, self.slots, strict=True)):
            numel = row.numel()
            for begin in range(0, numel, CHUNK):
                entries.append((index, group, begin, min(CHUNK, numel - begin), slot + begin))
        return torch.tensor(entries, dtype=torch.int64, device="cpu").reshape(-1, 5)

    @cached_property
    def row_table(self) -> Tensor:
        """int64 tensor ``[num_rows, 3]`` on the CPU: group, number of elements, first element in the flat index space.

        The layout is that of ``struct Row`` in csrc/table.h.
        """
        entries = [(group, row.numel(), slot) for row, group, slot in zip(self.rows, self.groups, self.slots, strict=True)]
        return torch.tensor(entries, dtype=torch.int64, device="cpu").reshape(-1, 3)

    @cached_property
    def flat(self) -> Tensor:
        """The backup: ``numel`` elements, allocated at first use and kept."""
        if self._backup is not None:
            return self._backup.flat
        with torch.inference_mode(False):  # first used in inference mode, it must still be writable outside
            return torch.empty(self.numel, dtype=self.dtype, device=self.device)

    def by_parameter(self) -> Bucket:
        """A bucket whose rows are the parameters that this one's rows stand for, with this one's backup."""
        groups = [group for group, params in zip(self.groups, self.params, strict=True) for _ in params]
        return Bucket(self.all_params, groups, self.backend, backup=self)

    @cached_property
    def flat_rows(self) -> list[Tensor]:
        """The backup's slots as tensors of the rows' shapes, elements in the rows' memory order where the row is dense."""
        return [self.flat.as_strided(*layout, slot) for layout, slot in zip(self._layouts, self.slots, strict=True)]


def dense_layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    """Shape and strides of ``tensor`` if it is dense, else its shape and the strides that make it contiguous."""
    if is_dense(tensor):
        return tensor.shape, tensor.stride()
    return tensor.shape, torch.empty(tensor.shape, device="meta").stride()
