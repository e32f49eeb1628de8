"""The last elements of a tensor: nothing behind them is touched, where the next page may be nobody's."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from cases import make_params, same_bits, values
from torch import Tensor, nn

from sam_fast import SAM
from sam_fast.backends import Backend

PAGE = mmap.PAGESIZE
SIZES = [*range(1, 36), 63, 64, 65]
AHEAD = 2048
"""Bytes before a tensor's end at which a step stops prefetching: ``kStepAhead`` of csrc/cpu/step.h."""

_libc = ctypes.CDLL(None, use_errno=True)


def at_the_end_of_memory(tensor: Tensor) -> Tensor:
    """A copy, behind which lies a page that cannot be read or written."""
    memory = mmap.mmap(-1, 2 * PAGE)
    begin = PAGE - tensor.numel() * tensor.itemsize
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin)
    copy.copy_(tensor.detach())
    guarded = ctypes.c_void_p(copy.data_ptr() - begin + PAGE)
    assert _libc.mprotect(guarded, ctypes.c_size_t(PAGE), 0) == 0
    return copy


@pytest.mark.parametrize("adaptive", [False, True], ids=["", "adaptive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nothing_behind_a_tensor_is_touched(kernels: Backend, dtype: torch.dtype, adaptive: bool) -> None:
    if kernels.name != "cpu":
        pytest.skip("memory of the CPU is guarded")
    found = []
    ahead = [(AHEAD + vectors) // dtype.itemsize + i for vectors in range(0, 160, 32) for i in (-1, 0, 1)]
    for guarded in (True, False):
        params = make_params([*SIZES, *ahead], dtype)
        if guarded:
            grads = [at_the_end_of_memory(p.grad) for p in params]
            params = [nn.Parameter(at_the_end_of_memory(p)) for p in params]
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
        optimizer = SAM(params, torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.1, momentum=0.9, backend="cpu")
        for _ in range(2):
            optimizer.first_step()
            optimizer.second_step()
        assert optimizer.second_step_path == "fused"
        found.append(values(params))
    assert same_bits(*found)
