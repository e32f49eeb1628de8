"""The ``cuda`` backend: CUDA C++ kernels (csrc/cuda), address tables by value in the kernel arguments, on the current stream."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .addresses import DTYPE_CODES, AddressBackend, AddressTable
from .base import GroupOptions, StateTensors

try:
    from .. import _cuda

    _import_error: ImportError | None = None
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    _import_error = error

if TYPE_CHECKING:
    from ..amp import Scaling
    from ..bucket import Bucket


def _current_stream(device: torch.device) -> int:
    """The stream's handle; the default stream's is 0."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


@cache
def _why_unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None. Asked once: neither the module nor the driver changes while the process lives."""
    try:
        _cuda.probe(device.index or 0)
    except RuntimeError as error:
        reason = str(error)
    else:
        return None
    if "cudaErrorNoKernelImageForDevice" in reason:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        todo = f"sam_fast._cuda was built for {_cuda.architectures}: build it with TORCH_CUDA_ARCH_LIST={capability}"
    elif "cudaErrorInsufficientDriver" in reason:
        todo = f"the driver is older than {_cuda.compiler} wants, which built sam_fast._cuda: update the driver, or build with its CUDA version"
    else:
        todo = "sam_fast._cuda cannot use this device"
    return f"{todo} ({reason})"


def _learning_rates(state: StateTensors) -> array[int]:
    """``struct LearningRate`` (csrc/table.h) for each group; empty if none is on the device."""
    table = array("q")
    for lr in state.learning_rates:
        table.extend((0, 0) if lr is None else (lr.data_ptr(), DTYPE_CODES[lr.dtype]))
    return table


def _count_steps(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Add 1 to the counters unless ``found_inf``, which is 0 or 1. After the kernels, which read them as they were."""
    if steps:
        torch._foreach_add_(steps, 1.0)
        if found_inf is not None:
            torch._foreach_add_(steps, found_inf, alpha=-1.0)


class CudaTable(AddressTable):
    """The addresses, and what the kernels need to know of the rows."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket)
        self.device_index = bucket.device.index or 0
        self.rows_address = bucket.row_table.data_ptr()
        self.num_rows = len(bucket.rows)
        code = DTYPE_CODES.get(bucket.dtype)  # None: only saved and restored
        self.num_partials = 0 if code is None else _cuda.grad_norm_blocks(self.device_index, code, self.rows_address, self.num_rows)


class CudaBackend(AddressBackend):
    """Every operation is asynchronous. It is one launch for each 800 rows, restore_sgd for each 700 and restore_adam for each 448."""

    name = "cuda"
    reverse = True
    """perturb walks backwards, so that the gradients that grad_norm read last, which are still in the L2 cache, come first."""

    def unavailable(self) -> str | None:
        if torch.version.hip:
            return "this PyTorch is built for ROCm; the triton backend serves it"
        if _cuda is None:
            return f"the native module sam_fast._cuda is missing ({_import_error}): install sam_fast where nvcc is (CUDA_HOME or PATH)"
        if _cuda.device_type == "cuda" and not torch.cuda.is_available():
            return "PyTorch finds no usable CUDA device" if torch.version.cuda else "this PyTorch is built without CUDA"
        return None

    def build_info(self) -> dict[str, str]:
        return {} if _cuda is None else {"compiler": _cuda.compiler, "architectures": _cuda.architectures}

    def rejects_device(self, tensor: Tensor) -> str | None:
        if tensor.device.type != _cuda.device_type:
            return f"a tensor on {tensor.device} (the cuda backend takes CUDA tensors)"
        reason = self.unusable_on(tensor.device)
        return None if reason is None else f"a tensor on {tensor.device}: {reason}"

    def unusable_on(self, device: torch.device) -> str | None:
        return _why_unusable(device)

    def attach(self, bucket: Bucket) -> CudaTable:
        return CudaTable(bucket)

    def num_partials(self, bucket: Bucket) -> int:
        table: CudaTable = bucket.table
        return table.num_partials

    def grad_norm(self, bucket: Bucket, options: GroupOptions, partials: Tensor) -> None:
        table: CudaTable = bucket.table
        _cuda.grad_norm(
            table.device_index,
            _current_stream(bucket.device),
            DTYPE_CODES[bucket.dtype],
            table.rows_address,
            table.num_rows,
            table.weights_address,
            table.grads_address,
            options.values.buffer_info()[0],
            partials.data_ptr(),
            partials.numel(),
        )

    def launch_perturb(self, bucket: Bucket, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> int:
        table: CudaTable = bucket.table
        return _cuda.perturb(
            table.device_index,
            _current_stream(bucket.device),
            DTYPE_CODES[bucket.dtype],
            table.rows_address,
            table.num_rows,
            table.weights_address,
            table.grads_address,
            table.saved_address,
            options.values.buffer_info()[0],
            partials.data_ptr(),
            partials.numel(),
            eps,
            norm.data_ptr(),
            bucket.flat.data_ptr(),
            self.reverse,
            options.rounding_key,
        )

    def launch_copy(self, bucket: Bucket, restore: bool, release: bool) -> None:
        table: CudaTable = bucket.table
        common = (
            table.device_index,
            _current_stream(bucket.device),
            bucket.dtype.itemsize,
            table.rows_address,
            table.num_rows,
            table.weights_address,
            table.saved_address,
            bucket.flat.data_ptr(),
        )
        if restore:
            _cuda.restore(*common, release)
        else:
            _cuda.backup(*common)

    fused_steps = frozenset({"restore_sgd", "restore_adam"})
    decides_on_device = True

    def restore_sgd(self, bucket: Bucket, state: StateTensors, scaling: Scaling) -> None:
        table: CudaTable = bucket.table
        self._restore_and_step(_cuda.restore_sgd, bucket, state, scaling, table.states["momentum_buffer"].address)

    def restore_adam(self, bucket: Bucket, state: StateTensors, scaling: Scaling) -> None:
        table: CudaTable = bucket.table
        addresses = [table.states[name].address for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
        self._restore_and_step(_cuda.restore_adam, bucket, state, scaling, state.device_steps, *addresses)
        if state.device_steps:
            _count_steps([step for step in state.tensors["step"] if step is not None], scaling.found_inf)

    def _restore_and_step(self, kernel: Callable[..., int], bucket: Bucket, state: StateTensors, scaling: Scaling, *of_operation: Any) -> None:
        table: CudaTable = bucket.table
        learning_rates = _learning_rates(state)
        # A GradScaler's are float32 already.
        grad_scale, found_inf = (None if tensor is None else tensor.float() for tensor in (scaling.grad_scale, scaling.found_inf))
        left = kernel(
            table.device_index,
            _current_stream(bucket.device),
            DTYPE_CODES[bucket.dtype],
            table.rows_address,
            table.num_rows,
            table.weights_address,
            table.grads_address,
            table.saved_address,
            bucket.flat.data_ptr(),
            0 if grad_scale is None else grad_scale.data_ptr(),
            0 if found_inf is None else found_inf.data_ptr(),
            learning_rates.buffer_info()[0] if learning_rates else 0,
            state.rounding_key,
            state.groups.buffer_info()[0],
            *of_operation,
        )
        table.all_saved = False
        for column in table.states.values():
            column.count(table.grads)
        table.release_copies()
        if left:  # rows whose gradient vanished between the passes
            self.launch_copy(bucket, True, True)


BACKEND = CudaBackend()
