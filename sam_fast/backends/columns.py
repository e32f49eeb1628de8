"""Columns: one address per tensor of a bucket, read anew at every step from a tensor that must match the bucket's.

Gradients, a direction given as a list of tensors, and the base optimizer's state are all columns. ``Gather`` reads
them: the native one (csrc/gather.h) if it was built, else :class:`PythonGather`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .memory import has_memory, is_plain, is_wrapper, rejects_memory, signature

try:
    from .. import _cpu
except ImportError:
    _cpu = None  # type: ignore[assignment]

NO_COUNTERS, HOST_FLOAT32, HOST_FLOAT64, DEVICE_FLOAT32 = range(4)
"""The kinds of step counters: ``Gather::Counters`` in csrc/gather.h."""

WrongState = tuple[bool, int, int]
"""What is wrong with a state: whether it is missing (else it is not laid out as its tensor), the number of its tensor,
the number of its name.
"""


def column(size: int) -> array[int]:
    """Addresses of ``size`` tensors, all 0. An array that is never resized stays where it is."""
    return array("Q", bytes(8 * size))


def _same_objects(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


same_objects: Callable[[list[Any], list[Any]], bool] = _same_objects if _cpu is None else _cpu.same_objects
"""Whether two lists hold the same objects."""


GradientOf = Callable[[Tensor], Tensor | None]
"""The gradient of a parameter as its bucket's tensor has it: of a DTensor, what this process holds."""

grad_of: GradientOf = attrgetter("grad")


def all_none(items: list[Any]) -> bool:
    """Whether every item is None."""
    return all(map(is_, items, repeat(None)))


def local_tensor(tensor: Any) -> Any:
    """What this process holds of a DTensor; any other tensor as it is."""
    local = getattr(tensor, "_local_tensor", None)
    if local is None:
        return tensor
    wait = getattr(local, "trigger_wait", None)  # an asynchronous collective may still be writing it
    return local if wait is None else wait()


def tensor_now(source: Tensor, tensor: Tensor) -> Tensor:
    """The tensor of a bucket, or what its DTensor ``source`` holds now, which may be another one."""
    return local_tensor(source) if is_wrapper(type(source)) else tensor  # type: ignore[no-any-return]


def state_tensors(
    state: Any, params: Sequence[Tensor], takes: Sequence[int], bit: int, name: str
) -> list[Tensor | None] | int:
    """``state[param][name]`` for each param whose entry in ``takes`` has the bit; or the number of the first param
    without such a state.
    """
    found: list[Tensor | None] = []
    for i, (param, mask) in enumerate(zip(params, takes, strict=True)):
        value = state[param].get(name) if mask & bit and param in state else None
        if value is None and mask & bit:
            return i
        found.append(local_tensor(value))
    return found


class PythonGather:
    """What ``_cpu.Gather`` does, in Python; csrc/gather.h says what."""

    def __init__(self, tensors: list[Tensor], params: list[Tensor], groups: list[int]) -> None:
        self.tensors, self.params, self.groups = list(tensors), list(params), list(groups)
        self.expected = [signature(tensor) for tensor in tensors]
        self.has_grad = bytes(len(tensors))
        self.moved = False

    @property
    def num_grads(self) -> int:
        return len(self.has_grad) - self.has_grad.count(0)

    def weights(self, addresses: array[int]) -> list[int]:
        before = addresses[:]
        now = map(tensor_now, self.params, self.tensors)
        changed = [i for i, tensor in enumerate(now) if not self._matches(i, tensor, addresses)]
        self.moved = addresses != before
        return changed

    def collect(
        self, weights: array[int], grads: array[int], wanted: bytes | None = None
    ) -> tuple[list[int], list[int]]:
        return self.weights(weights), self._grads(grads, wanted)

    def _grads(self, addresses: array[int], wanted: bytes | None) -> list[int]:
        odd, has_grad = [], bytearray(len(self.params))
        for i, (param, group) in enumerate(zip(self.params, self.groups, strict=True)):
            addresses[i] = 0
            grad = param.grad if wanted is None or wanted[group] else None
            if grad is not None:
                has_grad[i] = 1
                alike = not hasattr(grad, "_local_tensor") or grad.placements == param.placements  # type: ignore[attr-defined]
                if not alike or not self._matches(i, local_tensor(grad), addresses):
                    odd.append(i)
        self.has_grad = bytes(has_grad)
        return odd

    def read(self, tensors: list[Tensor | None], addresses: array[int]) -> list[int]:
        if len(tensors) != len(self.tensors):
            raise ValueError(f"tensors must be a list with a tensor or None for each of {len(self.tensors)}")
        addresses[:] = column(len(addresses))
        local = [local_tensor(tensor) for tensor in tensors]
        return [i for i, tensor in enumerate(local) if tensor is not None and not self._matches(i, tensor, addresses)]

    def states(
        self, state: Any, names: tuple[str, ...], masks: array[int], columns: tuple[array[int], ...]
    ) -> WrongState | None:
        for k, (name, addresses) in enumerate(zip(names, columns, strict=True)):
            tensors = state_tensors(state, self.params, self._takes(masks), 1 << k, name)
            if isinstance(tensors, int):
                return True, tensors, k
            odd = self.read(tensors, addresses)
            if odd:
                return False, odd[0], k
        return None

    def counters(
        self, state: Any, name: str, bit: int, masks: array[int], addresses: array[int]
    ) -> tuple[WrongState | None, list[Tensor], int]:
        addresses[:] = column(len(addresses))
        tensors = state_tensors(state, self.params, self._takes(masks), bit, name)
        if isinstance(tensors, int):
            return (True, tensors, 0), [], NO_COUNTERS
        kinds = {_kind_of_counter(counter, self.tensors[i]) for i, counter in enumerate(tensors) if counter is not None}
        if len(kinds) > 1 or NO_COUNTERS in kinds:
            return (False, 0, 0), [], NO_COUNTERS
        for i, counter in enumerate(tensors):
            addresses[i] = 0 if counter is None else counter.data_ptr()
        return None, [counter for counter in tensors if counter is not None], kinds.pop() if kinds else NO_COUNTERS

    def _takes(self, masks: array[int]) -> list[int]:
        return [masks[group] if has else 0 for group, has in zip(self.groups, self.has_grad, strict=True)]

    def _matches(self, i: int, tensor: Tensor, addresses: array[int]) -> bool:
        addresses[i] = 0
        if not is_plain(tensor) or signature(tensor) != self.expected[i] or rejects_memory(tensor) is not None:
            return False
        if tensor.numel() > 0:
            addresses[i] = tensor.data_ptr()
        return has_memory(tensor)


def _kind_of_counter(counter: Tensor, tensor: Tensor) -> int:
    if not is_plain(counter) or counter.numel() != 1:
        return NO_COUNTERS
    if counter.device.type == "cpu":
        return {torch.float32: HOST_FLOAT32, torch.float64: HOST_FLOAT64}.get(counter.dtype, NO_COUNTERS)
    return DEVICE_FLOAT32 if counter.dtype == torch.float32 and counter.device == tensor.device else NO_COUNTERS


def make_gather(tensors: list[Tensor], params: list[Tensor], groups: list[int]) -> Any:
    """What reads the columns of a bucket: the native Gather if it was built, else the one in Python.

    Args:
        tensors: strided tensors of one device and dtype.
        params: for each the parameter whose ``.grad`` is the gradient and which is the key of the base optimizer's
            state: the tensor itself, or the DTensor that it is a part of.
        groups: for each the index of its parameter group.
    """
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _cpu is None or exchange is None:
        return PythonGather(tensors, params, groups)
    return _cpu.Gather(exchange, Tensor, tensors, params, groups)
