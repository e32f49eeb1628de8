"""The ``cuda`` backend: CUDA C++ kernels (csrc/cuda), addresses by value in the kernel arguments, on the current
stream.
"""

from __future__ import annotations

from array import array
from functools import cache, cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..amp import Scaling
from .bucket import GroupOptions, StepOptions
from .native import DTYPE_CODES, NativeBackend, NativeBucket, why_missing

try:
    from .. import _cuda

    _import_error: ImportError | None = None
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    _import_error = error


def _current_stream(device: torch.device) -> int:
    """The stream's handle; the default stream's is 0."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


@cache
def _why_unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None. Cached: neither the module nor the driver changes."""
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
        todo = (
            f"the driver is older than {_cuda.compiler} wants, which built sam_fast._cuda: "
            "update the driver, or build with its CUDA version"
        )
    else:
        todo = "sam_fast._cuda cannot use this device"
    return f"{todo} ({reason})"


def _learning_rates(options: StepOptions) -> array[int]:
    """``struct LearningRate`` (csrc/table.h) for each group; empty if none is on the device."""
    table = array("q")
    for lr in options.learning_rates:
        table.extend((0, 0) if lr is None else (lr.data_ptr(), DTYPE_CODES[lr.dtype]))
    return table


class CudaBucket(NativeBucket):
    """Every operation is asynchronous: one launch for as many tensors as fit into a kernel's arguments
    (csrc/cuda/arguments.h).
    """

    backend = "cuda"
    steps = frozenset() if _cuda is None else frozenset(_cuda.steps)
    decides_on_device = True
    reverse: ClassVar[bool] = True
    """perturb walks backwards: the gradients that grad_norm read last, still in the L2 cache, come first."""

    @cached_property
    def _device_index(self) -> int:
        return self.device.index or 0

    @property
    def _where(self) -> tuple[int, int, int]:
        """What every launch is given: the device, its current stream, the bucket."""
        return self._device_index, _current_stream(self.device), self.address

    @cached_property
    def num_partials(self) -> int:
        return 0 if self.dtype not in DTYPE_CODES else _cuda.grad_norm_blocks(self._device_index, self.address)

    def grad_norm(self, options: GroupOptions, partials: Tensor) -> None:
        _cuda.grad_norm(*self._where, options.address, partials.data_ptr(), partials.numel())

    def launch_perturb(self, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> int:
        return _cuda.perturb(
            *self._where,
            options.address,
            partials.data_ptr(),
            partials.numel(),
            eps,
            norm.data_ptr(),
            self.reverse,
            options.rounding_key,
        )

    def launch_copy(self, restore: bool, release: bool) -> None:
        if restore:
            _cuda.restore(*self._where, release)
        else:
            _cuda.backup(*self._where)

    def launch_step(self, options: StepOptions, scaling: Scaling) -> int:
        learning_rates = _learning_rates(options)
        # A GradScaler's are float32 already, and are not copied.
        numbers = (scaling.grad_scale, scaling.found_inf)
        grad_scale, found_inf = (None if tensor is None else tensor.float() for tensor in numbers)
        return _cuda.step(
            _cuda.steps[options.rule.name][0],
            *self._where,
            options.values.buffer_info()[0],
            0 if grad_scale is None else grad_scale.data_ptr(),
            0 if found_inf is None else found_inf.data_ptr(),
            learning_rates.buffer_info()[0] if learning_rates else 0,
            self.device_counters,
            options.rounding_key,
        )


class CudaBackend(NativeBackend):
    name = "cuda"
    bucket = CudaBucket

    def unavailable(self) -> str | None:
        if torch.version.hip:
            return "this PyTorch is built for ROCm; the triton backend serves it"
        if _cuda is None:
            reason = why_missing("sam_fast._cuda", _import_error)
            return f"{reason}: install sam_fast where nvcc is (CUDA_HOME or PATH)"
        if _cuda.device_type == "cuda" and not torch.cuda.is_available():
            return "PyTorch finds no usable CUDA device" if torch.version.cuda else "this PyTorch is built without CUDA"
        return None

    def build_info(self) -> dict[str, str]:
        return {} if _cuda is None else {"compiler": _cuda.compiler, "architectures": _cuda.architectures}

    def rejects_device(self, tensor: Tensor) -> str | None:
        if tensor.device.type != _cuda.device_type:
            return f"a tensor on {tensor.device} (the cuda backend takes CUDA tensors)"
        return None

    def unusable_on(self, device: torch.device) -> str | None:
        return _why_unusable(device)


BACKEND = CudaBackend()
