"""The ``cpu`` backend: C++ kernels (csrc/cpu), OpenMP, AVX2 or AVX-512 chosen at run time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .addresses import DTYPE_CODES, AddressBackend, AddressTable
from .base import GroupOptions, StateTensors

try:
    from .. import _cpu

    _import_error: ImportError | None = None
except ImportError as error:
    _cpu = None  # type: ignore[assignment]
    _import_error = error

if TYPE_CHECKING:
    from ..amp import Scaling
    from ..bucket import Bucket

ISA_VARIABLE = "SAM_FAST_CPU_ISA"
"""Environment variable that names the instruction set: baseline, avx2 or avx512; by default the best that the processor has."""

if _cpu is not None and os.environ.get(ISA_VARIABLE):
    _cpu.use_isa(os.environ[ISA_VARIABLE])


class CpuTable(AddressTable):
    """The addresses, and the chunks that the threads share out."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket)
        self.chunks_address = bucket.chunks.data_ptr()
        self.num_chunks = len(bucket.chunks)


class CpuBackend(AddressBackend):
    name = "cpu"

    def unavailable(self) -> str | None:
        if _cpu is None:
            return f"the native module sam_fast._cpu is missing ({_import_error}): install sam_fast with a C++17 compiler and SAM_FAST_NATIVE=1"
        if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
            return f"PyTorch {torch.__version__} has no DLPack C exchange interface: PyTorch 2.10 or newer is needed"
        return None

    def build_info(self) -> dict[str, str]:
        if _cpu is None:
            return {}
        threads = "OpenMP" if _cpu.openmp else "none (built without OpenMP)"
        return {"compiler": _cpu.compiler, "threads": threads, "instruction set in use": _cpu.isa(), "sanitizer": _cpu.sanitizer or "none"}

    def rejects_device(self, tensor: Tensor) -> str | None:
        return None if tensor.device.type == "cpu" else f"a tensor on {tensor.device} (the cpu backend takes CPU tensors)"

    def attach(self, bucket: Bucket) -> CpuTable:
        return CpuTable(bucket)

    def num_partials(self, bucket: Bucket) -> int:
        table: CpuTable = bucket.table
        return table.num_chunks

    def grad_norm(self, bucket: Bucket, options: GroupOptions, partials: Tensor) -> None:
        table: CpuTable = bucket.table
        _cpu.grad_norm(
            DTYPE_CODES[bucket.dtype],
            table.chunks_address,
            table.num_chunks,
            table.weights_address,
            table.grads_address,
            options.values.buffer_info()[0],
            partials.data_ptr(),
            torch.get_num_threads(),
        )

    def launch_perturb(self, bucket: Bucket, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> int:
        table: CpuTable = bucket.table
        return _cpu.perturb(
            DTYPE_CODES[bucket.dtype],
            table.chunks_address,
            table.num_chunks,
            table.weights_address,
            table.grads_address,
            table.saved_address,
            options.values.buffer_info()[0],
            partials.data_ptr(),
            partials.numel(),
            eps,
            norm.data_ptr(),
            bucket.flat.data_ptr(),
            options.rounding_key,
            torch.get_num_threads(),
        )

    def launch_copy(self, bucket: Bucket, restore: bool, release: bool) -> None:
        table: CpuTable = bucket.table
        common = (
            bucket.dtype.itemsize,
            table.chunks_address,
            table.num_chunks,
            table.weights_address,
            table.saved_address,
            bucket.flat.data_ptr(),
        )
        if restore:
            _cpu.restore(*common, release, torch.get_num_threads())
        else:
            _cpu.backup(*common, torch.get_num_threads())

    fused_steps = frozenset({"restore_sgd", "restore_adam"})

    def restore_sgd(self, bucket: Bucket, state: StateTensors, scaling: Scaling) -> None:
        self._restore_and_step(_cpu.restore_sgd, bucket, state, scaling, ("momentum_buffer",))

    def restore_adam(self, bucket: Bucket, state: StateTensors, scaling: Scaling) -> None:
        self._restore_and_step(_cpu.restore_adam, bucket, state, scaling, ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"))

    def _restore_and_step(self, kernel: Callable[..., int], bucket: Bucket, state: StateTensors, scaling: Scaling, names: tuple[str, ...]) -> None:
        table: CpuTable = bucket.table
        left = kernel(
            DTYPE_CODES[bucket.dtype],
            table.chunks_address,
            table.num_chunks,
            len(bucket.rows),
            table.weights_address,
            table.grads_address,
            table.saved_address,
            bucket.flat.data_ptr(),
            scaling.grad_factor(),
            state.rounding_key,
            state.groups.buffer_info()[0],
            *(table.states[name].address for name in names),
            torch.get_num_threads(),
        )
        table.all_saved = False
        for column in table.states.values():
            column.count(table.grads)
        table.release_copies()
        if left:  # rows whose gradient vanished between the passes
            self.launch_copy(bucket, True, True)


BACKEND = CpuBackend()
