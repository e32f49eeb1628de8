"""What backends share if their kernels take addresses: struct Bucket of csrc/table.h, and all but the launches."""

from __future__ import annotations

import json
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from ..amp import Scaling
from ..devices import can_capture, check_whole_step, is_capturing, never_ran
from ..steps import NotFused, wrong_state
from .bucket import (
    NO_LONGER_LAID_OUT,
    Backend,
    Bucket,
    GroupOptions,
    ParameterError,
    StepOptions,
    check_direction,
    shape_changed,
    step_gradient,
)
from .columns import DEVICE_FLOAT32, HOST_FLOAT32, HOST_FLOAT64, NO_COUNTERS, column, make_gather, tensor_now
from .memory import has_memory, is_dense, is_plain, rejects_memory, signature

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Matches ``enum class DType`` in csrc/table.h."""

BUILD_NOTE = Path(__file__).parent.parent / "_build_info.json"
"""The file in which setup.py notes for each native module that it was built, or why not."""

MAX_STATES = 3

FIELDS = (
    "dtype",
    "itemsize",
    "num_tensors",
    "num_chunks",
    "tensors",
    "chunks",
    "weights",
    "along",
    "saved",
    "backup",
    "counters",
    *(f"states[{k}]" for k in range(MAX_STATES)),
)
"""The members of ``struct Bucket`` in csrc/table.h, 8 bytes each. A test compares them."""


class NativeBucket(Bucket):
    """A bucket whose kernels take addresses: columns of them, and a struct that says where the columns are.

    Addresses are read anew whenever an operation starts, and every tensor is compared with what it was when the bucket
    was built: dtype, device, shape and strides. A kernel never sees the address of a tensor that does not match.
    """

    counts: ClassVar[bool] = True
    """Whether a step's kernel adds 1 to float32 step counters on the host."""

    proves_backup: ClassVar[bool] = False
    """Whether the device knows that a backup was never written."""

    def __init__(self, tensors: Sequence[Tensor], groups: Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(tensors, groups, *args, **kwargs)
        size = len(self.tensors)
        self._gather = make_gather(self.tensors, self.sources, self.groups)
        self._weights, self._along, self._saved, self._counters = (column(size) for _ in range(4))
        self._states = tuple(column(size) for _ in range(MAX_STATES))
        self._occupied = size - len(self.empty)
        # How many tensors with elements are saved; None: not known. ``_saved`` says which; this saves looking there.
        self._num_saved: int | None = 0
        self._can_capture = can_capture(self.device)
        self._copies: dict[int, Tensor] = {}  # copies of directions, in their tensors' layout
        self._steps: list[Tensor] = []  # step counters of the tensors that have a gradient
        self._wide_steps: Tensor | None = None
        self._uncounted: list[Tensor] = []  # those that the kernel does not count
        self.device_counters = self.host_counters = False
        values = {
            "dtype": DTYPE_CODES.get(self.dtype, -1),  # -1: only saved and restored
            "itemsize": self.dtype.itemsize,
            "num_tensors": size,
            "num_chunks": len(self.chunks),
            "tensors": self.tensor_table.data_ptr(),
            "chunks": self.chunks.data_ptr(),
            "weights": _address(self._weights),
            "along": _address(self._along),
            "saved": _address(self._saved),
            "backup": 0,
            "counters": _address(self._counters),
            **{f"states[{k}]": _address(states) for k, states in enumerate(self._states)},
        }
        self._struct = array("q", [values[field] for field in FIELDS])
        self.address = _address(self._struct)
        """The address of the bucket's ``struct Bucket``."""

    def _allocate_backup(self) -> Tensor:
        backup = super()._allocate_backup()
        self._struct[FIELDS.index("backup")] = backup.data_ptr()
        return backup

    # ---- First step --------------------------------------------------------------------------------------------------

    def collect(self, options: GroupOptions, along: list[Tensor | None] | None = None) -> bool:
        self._copies.clear()
        if along is None:
            changed, odd = self._collect(options.wanted)
        else:
            changed = self._look_at_weights()
            perturb = (options.perturb[group] for group in self.groups)
            along = [tensor if takes_part else None for tensor, takes_part in zip(along, perturb, strict=True)]
            odd = self._gather.read(along, self._along)
        if changed:
            self._require_memory(changed)
            return False
        for index in odd:
            direction = self.gradient_of(index) if along is None else along[index]
            assert direction is not None
            self._copy_in_layout(index, direction)
        return True

    def _collect(self, wanted: bytes | None) -> tuple[list[int], list[int]]:
        if self.has_wrappers:
            # Else each access to a tensor looks up the __torch_function__ of its class. DTensor has none of its own.
            with DisableTorchFunctionSubclass():
                changed, odd = self._gather.collect(self._weights, self._along, wanted)
        else:
            changed, odd = self._gather.collect(self._weights, self._along, wanted)
        self.moved = self.moved or self._gather.moved
        return changed, odd

    def _look_at_weights(self) -> list[int]:
        """Read the weights' addresses. Returns those that are not what the bucket was built for."""
        changed: list[int] = self._gather.weights(self._weights)
        self.moved = self.moved or self._gather.moved
        return changed

    def perturb(self, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> None:
        _ = self.backup
        self._num_saved = None
        if self._can_capture:
            recorded = is_capturing(self.device)
            self._recorded = None if recorded and self.proves_backup else recorded
        self._num_saved = self.launch_perturb(options, partials, eps, norm)
        if self._copies:
            self._release_copies()

    @abstractmethod
    def launch_perturb(self, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> int:
        """Run the kernel; it marks the tensors as saved. Returns their number, those without elements not counted."""

    @abstractmethod
    def launch_copy(self, restore: bool, release: bool) -> None:
        """Back all tensors up and mark them as saved, or restore those that are saved."""

    def _copy_in_layout(self, index: int, direction: Tensor) -> None:
        """Use the direction with its tensor's own dtype and strides: a copy, kept until the operation is done."""
        tensor = self.tensors[index]
        check_direction(direction, tensor, self.sources[index])
        if is_plain(direction) and not has_memory(direction) and not direction._is_zerotensor():
            raise _no_memory(self.sources[index], "a gradient")
        if is_plain(direction) and signature(direction) == signature(tensor) and rejects_memory(direction) is None:
            self._copies[index] = direction.detach()
        else:
            self._copies[index] = torch.empty_like(tensor, requires_grad=False).copy_(direction.detach())
        self._along[index] = self._copies[index].data_ptr()

    def _release_copies(self) -> None:
        """Free the directions that had to be copied: the kernels are done with them."""
        for index in self._copies:
            self._along[index] = 0
        self._copies.clear()

    def _require_memory(self, indices: list[int]) -> None:
        for index in indices:
            if is_plain(self.tensors[index]) and not has_memory(self.tensors[index]):
                raise _no_memory(self.sources[index], "weights")

    # ---- Backup ------------------------------------------------------------------------------------------------------

    def saved(self) -> list[int] | None:
        if self._num_saved == self._occupied and self._occupied:
            return None
        return [] if self._num_saved == 0 else [i for i, address in enumerate(self._saved) if address]

    def save(self) -> bool:
        if self._look_at_weights():
            return False
        _ = self.backup
        self._num_saved = self._recorded = None
        self.launch_copy(restore=False, release=False)
        return True

    def restore(self, release: bool = True) -> None:
        if self._num_saved == 0:
            return
        if self._recorded is not None and never_ran(self._recorded, self.device):
            self.release()
            return
        changed = self._look_at_weights()
        self._num_saved = None
        self.launch_copy(restore=True, release=release)
        if changed:
            self._restore_changed(changed, release)
        elif release:
            self._num_saved = 0

    def release(self) -> None:
        self._num_saved = 0
        self._saved[:] = column(len(self._saved))

    def _restore_changed(self, changed: list[int], release: bool) -> None:
        """Restore tensors that are saved but no longer match the bucket, with PyTorch's copy."""
        error: ParameterError | None = None
        for index in changed:
            tensor, backup = tensor_now(self.sources[index], self.tensors[index]), self.backups[index]
            if not self._saved[index] or (is_plain(tensor) and not has_memory(tensor)):
                continue  # one without memory stays saved, see below
            if release:
                self._saved[index] = 0
            if tensor.shape == backup.shape:
                tensor.data.copy_(backup)
            else:
                error = shape_changed(self.sources[index], backup, tensor)
        if error is not None:
            raise error
        self._require_memory(changed)

    # ---- Second step -------------------------------------------------------------------------------------------------

    def share_saved(self, source: Bucket) -> None:
        assert isinstance(source, NativeBucket)
        if source._num_saved != 0:
            _ = self.backup
        self._recorded = source._recorded
        if source.saved() is None:
            self._saved[:], self._num_saved = self._weights, self._occupied
            return
        saved = [bool(at) for at, params in zip(source._saved, source.params, strict=True) for _ in params]
        self._saved[:] = array("Q", [at if is_saved else 0 for at, is_saved in zip(self._weights, saved, strict=True)])
        self._num_saved = None

    def prepare_step(self, state: Any, options: StepOptions) -> None:
        self._copies.clear()
        changed, odd = self._collect(None)
        if changed:
            raise NotFused(NO_LONGER_LAID_OUT)
        for index in odd:
            self._copy_in_layout(index, step_gradient(self, index))
        rule = options.rule
        columns = self._states[: len(rule.states)]
        wrong = self._gather.states(state, rule.states, options.masks, columns)
        if wrong is not None:
            raise wrong_state(rule.states[wrong[2]], missing=wrong[0])
        if rule.counter is not None:
            self._read_counters(state, rule.counter, 1 << len(rule.states), options.masks)
        else:
            self._steps = self._uncounted = []
            self.device_counters = self.host_counters = False

    def with_gradient(self) -> list[int] | None:
        if self._gather.num_grads == len(self.tensors):
            return None
        return [index for index, has_grad in enumerate(self._gather.has_grad) if has_grad]

    def written_params(self) -> list[Tensor]:
        whole = self._gather.num_grads == len(self.tensors) or self._num_saved == self._occupied > 0
        return self.all_params if whole else super().written_params()  # most often no list is made

    def _read_counters(self, state: Any, name: str, bit: int, masks: array[int]) -> None:
        wrong, self._steps, kind = self._gather.counters(state, name, bit, masks, self._counters)
        if wrong is not None:
            raise wrong_state(name, missing=wrong[0])
        self.device_counters = kind == DEVICE_FLOAT32
        self.host_counters = kind not in (NO_COUNTERS, DEVICE_FLOAT32)
        self._wide_steps = self._steps_in_float32() if kind == HOST_FLOAT64 else None
        self._uncounted = self._steps
        if self.counts and kind == HOST_FLOAT32:  # all but those of tensors without elements
            counted = dict(zip(self._counted(), self._steps, strict=True)) if self.empty else {}
            self._uncounted = [counted[index] for index in self.empty if index in counted]

    def _steps_in_float32(self) -> Tensor:
        """Copies of float64 counters, which PyTorch makes if that is the default dtype. Kernels read float32 ones."""
        copies = torch.cat([step.detach().reshape(1) for step in self._steps]).float()
        for position, index in enumerate(self._counted()):
            self._counters[index] = copies.data_ptr() + copies.itemsize * position
        return copies

    def _counted(self) -> list[int]:
        """The tensors that have a step counter."""
        return [index for index, address in enumerate(self._counters) if address] if self._steps else []

    def restore_and_step(self, options: StepOptions, scaling: Scaling) -> None:
        if self._recorded is not None and any(self._saved):
            check_whole_step(self._recorded, self.device)
        self._num_saved = None
        left = self.launch_step(options, scaling)
        if self._uncounted:  # after the kernel, which reads them as they were
            by = 1.0 if scaling.found_inf is None else 1.0 - scaling.found_inf.reshape(())
            torch._foreach_add_(self._uncounted, by)
        if self._copies:
            self._release_copies()
        self._num_saved = left
        if left:  # tensors whose gradient vanished between the passes
            self.launch_copy(restore=True, release=True)
            self._num_saved = 0

    @abstractmethod
    def launch_step(self, options: StepOptions, scaling: Scaling) -> int:
        """Run the kernel of ``options.rule``. Returns how many tensors with elements are still saved."""


class NativeBackend(Backend):
    """A backend whose buckets are native."""

    @abstractmethod
    def rejects_device(self, tensor: Tensor) -> str | None:
        """Why this backend cannot take tensors on this device, or None."""

    def rejects(self, tensor: Tensor, arithmetic: bool = True) -> str | None:
        reason = self.rejects_device(tensor)
        if reason is not None:
            return reason
        if arithmetic and tensor.dtype not in DTYPE_CODES:
            takes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)
            return f"dtype {tensor.dtype} (the {self.name} backend takes {takes})"
        reason = rejects_memory(tensor)
        if reason is not None:
            return reason
        if not is_dense(tensor):
            where = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            return f"a tensor with gaps or overlaps in memory ({where})"
        return None


def build_note() -> dict[str, str]:
    """Native module -> "built", or why it is not; empty where setup.py left no note."""
    return json.loads(BUILD_NOTE.read_text()) if BUILD_NOTE.is_file() else {}


def why_missing(module: str, error: ImportError | None) -> str:
    """Why a native module cannot be imported: what setup.py noted, or if that says that it was built, the error."""
    noted = build_note().get(module, "built")
    return f"the native module {module} is missing ({error if noted == 'built' else noted})"


def _address(numbers: array[Any]) -> int:
    return numbers.buffer_info()[0]


def _no_memory(param: Tensor, whose: str) -> ParameterError:
    """The error for a tensor whose storage was resized to nothing."""
    problem = f"has {whose} without memory: the storage was resized to nothing. Resize it back first"
    return ParameterError(param, problem)
