"""Address tables: how the native kernels find a bucket's rows. Shared by the backends whose kernels take addresses."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bucket import is_dense, is_plain
from .base import (
    Backend,
    GroupOptions,
    StateTensors,
    check_dense_gradient,
    has_memory,
    rejects_memory,
    shape_changed,
    signature,
)

try:
    from .. import _cpu
except ImportError:
    _cpu = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from ..bucket import Bucket

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Matches ``enum class DType`` in csrc/table.h."""


class PythonGather:
    """What ``_cpu.Gather`` does (csrc/gather.h), where the native modules were not built."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = list(rows)
        self.expected = [signature(row) for row in rows]

    def weights(self, addresses: array[int]) -> list[int]:
        return [i for i, row in enumerate(self.rows) if not self._matches(i, row, addresses)]

    def grads(self, addresses: array[int]) -> list[int]:
        odd = []
        for i, row in enumerate(self.rows):
            addresses[i] = 0
            grad = row.grad
            if grad is not None and not self._matches(i, grad, addresses):
                odd.append(i)
        return odd

    def _matches(self, i: int, tensor: Tensor, addresses: array[int]) -> bool:
        addresses[i] = 0
        if not is_plain(tensor) or signature(tensor) != self.expected[i] or rejects_memory(tensor) is not None:
            return False
        if tensor.numel() > 0:
            addresses[i] = tensor.data_ptr()
        return has_memory(tensor)


def make_gather(rows: list[Tensor]) -> Any:
    """Reads and checks the addresses of ``rows`` and of their gradients; native where that was built."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _cpu is None or exchange is None:
        return PythonGather(rows)
    return _cpu.Gather(exchange, Tensor, rows)


class StateTable:
    """The addresses of one kind of the base optimizer's state: for every row a tensor like it, or a step counter (``scalar``).

    Kernels read counters in float32. Those in float64, which PyTorch makes on the host where that is the default dtype, are copied for them.
    """

    def __init__(self, rows: list[Tensor], scalar: bool) -> None:
        self.rows = rows
        self.scalar = scalar
        self.addresses = array("Q", bytes(8 * len(rows)))
        self.address = self.addresses.buffer_info()[0]
        self._tensors: list[Tensor | None] | None = None
        self._gather: Any = None
        self._wide: dict[int, Tensor] = {}  # counters in float64
        self._copies = torch.empty(0)

    def collect(self, tensors: list[Tensor | None], device_steps: bool = False) -> bool:
        """Read the addresses, 0 for None. False if a tensor is not what a kernel takes; counters are on the host, or on the rows' device.

        ``tensors`` must not be changed afterwards: the same list means the same tensors.
        """
        if tensors is not self._tensors:
            if not all(tensor is None or self._fits(tensor, row, device_steps) for tensor, row in zip(tensors, self.rows, strict=True)):
                return False
            counters = {i: t for i, t in enumerate(tensors) if t is not None} if self.scalar else {}
            wide = {i: t for i, t in counters.items() if t.dtype == torch.float64}
            if wide and len(wide) < len(counters):
                return False
            self._wide, self._copies = wide, torch.empty(len(wide), dtype=torch.float32, device="cpu")
            self._missing = [i for i, tensor in enumerate(tensors) if tensor is None]
            present = len(self._missing) < len(tensors)
            self._gather = (
                make_gather([row if tensor is None else tensor for tensor, row in zip(tensors, self.rows, strict=True)]) if present else None
            )
            self._tensors = tensors  # last: an interruption must not leave the addresses of other tensors behind
        if self._gather is None:
            self.addresses[:] = array("Q", bytes(8 * len(self.rows)))
            return True
        if self._gather.weights(self.addresses):
            self._tensors = None
            return False
        for i in self._missing:
            self.addresses[i] = 0
        if self._wide:
            torch.cat([counter.reshape(1) for counter in self._wide.values()], out=self._copies)
            for place, i in enumerate(self._wide):
                self.addresses[i] = self._copies.data_ptr() + self._copies.itemsize * place
        return True

    def count(self, grads: array[int]) -> None:
        """After a kernel has added 1 to the counters of rows that have a gradient: the same for those that it had copies of."""
        counters = [counter for i, counter in self._wide.items() if grads[i]]
        if counters:
            torch._foreach_add_(counters, 1.0)

    def _fits(self, tensor: Tensor, row: Tensor, device_steps: bool) -> bool:
        if not is_plain(tensor) or rejects_memory(tensor) is not None:
            return False
        if self.scalar:
            device = row.device if device_steps else torch.device("cpu")
            dtypes = (torch.float32,) if device_steps else (torch.float32, torch.float64)
            return tensor.dtype in dtypes and tensor.numel() == 1 and tensor.device == device
        return signature(tensor) == signature(row)


class AddressTable:
    """For every row of a bucket the address of its weight, its gradient and, while it has a backup, its address then; 0 where there is none.

    Addresses are read anew by :meth:`collect` and :meth:`collect_weights` whenever an operation starts, and every tensor is compared with what
    it was when the bucket was built: dtype, device, shape and strides. A kernel never sees the address of a tensor that does not match.
    """

    def __init__(self, bucket: Bucket) -> None:
        rows = len(bucket.rows)
        # Not the bucket, which has this table: a cycle would keep weights and backup alive until the garbage collector runs.
        self.rows = bucket.rows
        self.groups = bucket.groups
        self.gather = make_gather(bucket.rows)
        self.weights = array("Q", bytes(8 * rows))
        self.grads = array("Q", bytes(8 * rows))
        self.saved = array("Q", bytes(8 * rows))
        self.occupied = sum(row.numel() > 0 for row in bucket.rows)
        self.all_saved = False
        self.copies: dict[int, Tensor] = {}
        self.states: dict[str, StateTable] = {}
        # An array that is never resized stays where it is.
        self.weights_address = self.weights.buffer_info()[0]
        self.grads_address = self.grads.buffer_info()[0]
        self.saved_address = self.saved.buffer_info()[0]

    def collect_weights(self) -> list[int]:
        """Read the weights' addresses; returns the rows that are no longer what they were."""
        changed: list[int] = self.gather.weights(self.weights)
        return changed

    def collect(self, options: GroupOptions) -> bool:
        """See :meth:`sam_fast.backends.base.Backend.collect`."""
        changed = self.collect_weights()
        if changed:
            self._check_memory(changed)
            return False
        self.copies.clear()
        odd = self.gather.grads(self.grads)
        if not options.all_perturb:
            for row, group in enumerate(self.groups):
                if not options.perturb[group]:
                    self.grads[row] = 0
        for row in odd:
            if options.perturb[self.groups[row]]:
                self.grads[row] = self._like_row(row).data_ptr()
        return True

    def _check_memory(self, rows: list[int]) -> None:
        lost = [row for row in rows if is_plain(self.rows[row]) and not has_memory(self.rows[row])]
        if lost:
            raise RuntimeError(f"the parameters in rows {lost} have no memory: their storage was resized to nothing. Resize it back first")

    def _like_row(self, index: int) -> Tensor:
        """A copy of the row's gradient with the row's own dtype and strides, kept until the perturbation is done."""
        row = self.rows[index]
        grad = row.grad
        assert grad is not None
        check_dense_gradient(grad, row)
        if is_plain(grad) and not has_memory(grad) and not grad._is_zerotensor():
            raise RuntimeError(f"the gradient of row {index} has no memory: its storage was resized to nothing")
        self.copies[index] = torch.empty_like(row, requires_grad=False).copy_(grad.detach())
        return self.copies[index]

    def collect_step(self, state: StateTensors) -> bool:
        """See :meth:`sam_fast.backends.base.Backend.collect_step`."""
        if self.collect_weights():
            return False
        self.copies.clear()
        for row in self.gather.grads(self.grads):
            grad = self.rows[row].grad
            if grad is None or not is_plain(grad):
                return False  # sparse, in a group that is not perturbed
            self.grads[row] = self._like_row(row).data_ptr()
        return all(self._state_table(name).collect(tensors, state.device_steps) for name, tensors in state.tensors.items())

    def share_saved(self, source: AddressTable, source_params: list[list[Tensor]]) -> None:
        """See :meth:`sam_fast.backends.base.Backend.share_saved`; ``source_params``: the parameters of each of the source's rows."""
        row = 0
        for address, params in zip(source.saved, source_params, strict=True):
            for _ in params:
                self.saved[row] = self.weights[row] if address else 0
                row += 1

    def release(self) -> None:
        """Note that nothing is saved any more."""
        self.all_saved = False
        for row in range(len(self.saved)):
            self.saved[row] = 0

    def _state_table(self, name: str) -> StateTable:
        if name not in self.states:
            self.states[name] = StateTable(self.rows, scalar=name == "step")
        return self.states[name]

    def release_copies(self) -> None:
        """Free the gradients that had to be copied: the kernels are done with them."""
        for row in self.copies:
            self.grads[row] = 0
        self.copies.clear()

    def saved_rows(self) -> list[int]:
        return [row for row, address in enumerate(self.saved) if address]

    def restore_changed(self, changed: list[int], backups: list[Tensor], release: bool) -> None:
        """Restore rows that are saved but no longer match the bucket, by way of PyTorch. ``backups``: those of all rows."""
        lost = []
        for row in changed:
            if not self.saved[row]:
                continue
            tensor, backup = self.rows[row], backups[row]
            if is_plain(tensor) and not has_memory(tensor):
                continue  # stays saved, see below
            if release:
                self.saved[row] = 0
            if tensor.shape == backup.shape:
                tensor.data.copy_(backup)
            else:
                lost.append(f"row {row}: {tuple(backup.shape)} -> {tuple(tensor.shape)}")
        if lost:
            raise shape_changed(lost)
        self._check_memory(changed)


class AddressBackend(Backend):
    """What the backends whose kernels take addresses have in common: everything but the kernels and which tensors they take.

    A subclass's ``attach`` returns an :class:`AddressTable`.
    """

    @abstractmethod
    def rejects_device(self, tensor: Tensor) -> str | None:
        """Why this backend cannot take tensors on this device, or None."""

    @abstractmethod
    def launch_perturb(self, bucket: Bucket, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> int:
        """Run the kernel; it marks the rows as saved. Returns their number, rows without elements not counted."""

    @abstractmethod
    def launch_copy(self, bucket: Bucket, restore: bool, release: bool) -> None:
        """Back all rows up and mark them as saved, or restore those that are saved."""

    def rejects(self, tensor: Tensor, arithmetic: bool = True) -> str | None:
        reason = self.rejects_device(tensor)
        if reason is not None:
            return reason
        if arithmetic and tensor.dtype not in DTYPE_CODES:
            return f"dtype {tensor.dtype} (the {self.name} backend takes {', '.join(str(d).removeprefix('torch.') for d in DTYPE_CODES)})"
        reason = rejects_memory(tensor)
        if reason is not None:
            return reason
        if not is_dense(tensor):
            return f"a tensor with gaps or overlaps in memory (shape {tuple(tensor.shape)}, strides {tensor.stride()})"
        return None

    def addresses(self, bucket: Bucket) -> bytes:
        table: AddressTable = bucket.table
        return table.weights.tobytes()

    def collect(self, bucket: Bucket, options: GroupOptions) -> bool:
        table: AddressTable = bucket.table
        return table.collect(options)

    def perturb(self, bucket: Bucket, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> None:
        table: AddressTable = bucket.table
        table.all_saved = False
        rows = self.launch_perturb(bucket, options, partials, eps, norm)
        table.all_saved = rows == table.occupied
        table.release_copies()

    def collect_step(self, bucket: Bucket, state: StateTensors) -> bool:
        table: AddressTable = bucket.table
        return table.collect_step(state)

    def share_saved(self, bucket: Bucket, source: Bucket) -> None:
        table: AddressTable = bucket.table
        table.share_saved(source.table, source.params)

    def release(self, bucket: Bucket) -> None:
        table: AddressTable = bucket.table
        table.release()

    def saved(self, bucket: Bucket) -> list[int] | None:
        table: AddressTable = bucket.table
        return None if table.all_saved else table.saved_rows()

    def restore(self, bucket: Bucket, release: bool = True) -> None:
        table: AddressTable = bucket.table
        changed = table.collect_weights()
        self.launch_copy(bucket, True, release)
        table.all_saved = table.all_saved and not release
        if changed:
            table.restore_changed(changed, bucket.flat_rows, release)

    def save(self, bucket: Bucket) -> bool:
        table: AddressTable = bucket.table
        if table.collect_weights():
            return False
        self.launch_copy(bucket, False, False)
        return True
