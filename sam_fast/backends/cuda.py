"""The ``cuda`` backend: CUDA C++ kernels (csrc/cuda), address tables by value in the kernel arguments, on the current stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .addresses import DTYPE_CODES, AddressBackend, AddressTable
from .base import GroupOptions

try:
    from .. import _cuda

    _import_error: ImportError | None = None
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    _import_error = error

if TYPE_CHECKING:
    from ..bucket import Bucket


def _current_stream(device: torch.device) -> int:
    """The stream's handle; the default stream's is 0."""
    # The public torch.cuda.current_stream() makes an object each time, at several times the cost.
    return int(torch._C._cuda_getCurrentRawStream(device.index)) if device.type == "cuda" else 0


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
    """Every operation is asynchronous: grad_norm, perturb and restore are one launch each for up to 800 rows, and one for each further 800."""

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
        return None if tensor.device.type == _cuda.device_type else f"a tensor on {tensor.device} (the cuda backend takes CUDA tensors)"

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


BACKEND = CudaBackend()
