"""The ``cpu`` backend: C++ kernels (csrc/cpu), OpenMP, AVX2 or AVX-512 chosen at run time."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..amp import Scaling, inverse_scale
from .bucket import GroupOptions, StepOptions
from .native import NativeBackend, NativeBucket, why_missing

try:
    from .. import _cpu

    _import_error: ImportError | None = None
except ImportError as error:
    _cpu = None  # type: ignore[assignment]
    _import_error = error

ISA_VARIABLE = "SAM_FAST_CPU_ISA"
"""Environment variable that names the instruction set: baseline, avx2 or avx512; by default the processor's best."""

if _cpu is not None and os.environ.get(ISA_VARIABLE):
    try:
        _cpu.use_isa(os.environ[ISA_VARIABLE])
    except ValueError:
        raise ValueError(
            f"{ISA_VARIABLE}={os.environ[ISA_VARIABLE]!r} is unknown, or this processor cannot run it: use baseline, "
            "avx2 or avx512, or leave it out"
        ) from None


class CpuBucket(NativeBucket):
    backend = "cpu"
    steps = frozenset() if _cpu is None else frozenset(_cpu.steps)

    @property
    def num_partials(self) -> int:
        return len(self.chunks)

    def grad_norm(self, options: GroupOptions, partials: Tensor) -> None:
        _cpu.grad_norm(self.address, options.address, partials.data_ptr(), torch.get_num_threads())

    def launch_perturb(self, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> int:
        return _cpu.perturb(
            self.address,
            options.address,
            partials.data_ptr(),
            partials.numel(),
            eps,
            norm.data_ptr(),
            options.rounding_key,
            torch.get_num_threads(),
        )

    def launch_copy(self, restore: bool, release: bool) -> None:
        if restore:
            _cpu.restore(self.address, release, torch.get_num_threads())
        else:
            _cpu.backup(self.address, torch.get_num_threads())

    def launch_step(self, options: StepOptions, scaling: Scaling) -> int:
        return _cpu.step(
            _cpu.steps[options.rule.name][0],
            self.address,
            options.values.buffer_info()[0],
            1.0 if scaling.grad_scale is None else float(inverse_scale(scaling.grad_scale)),
            options.rounding_key,
            torch.get_num_threads(),
        )


class CpuBackend(NativeBackend):
    name = "cpu"
    bucket = CpuBucket

    def unavailable(self) -> str | None:
        if _cpu is None:
            reason = why_missing("sam_fast._cpu", _import_error)
            return f"{reason}: install sam_fast with a C++17 compiler and SAM_FAST_NATIVE=1"
        if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
            return f"PyTorch {torch.__version__} has no DLPack C exchange interface: PyTorch 2.10 or newer is needed"
        return None

    def build_info(self) -> dict[str, str]:
        if _cpu is None:
            return {}
        return {
            "compiler": _cpu.compiler,
            "threads": "OpenMP" if _cpu.openmp else "none (built without OpenMP)",
            "instruction set in use": _cpu.isa(),
            "sanitizer": _cpu.sanitizer or "none",
        }

    def rejects_device(self, tensor: Tensor) -> str | None:
        return (
            None if tensor.device.type == "cpu" else f"a tensor on {tensor.device} (the cpu backend takes CPU tensors)"
        )


BACKEND = CpuBackend()
