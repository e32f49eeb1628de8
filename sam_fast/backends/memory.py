"""Where a tensor's elements are: questions about its memory, and the layout of a bucket's flat index space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

ALIGNMENT = 64
"""Bytes. A cache line, and the widest vector of any CPU: slots never share a line and streaming stores are aligned."""


@cache
def is_wrapper(cls: type[Tensor]) -> bool:
    """True for a subclass whose elements lie elsewhere, or are not what memory holds: DTensor, quantised tensors."""
    return cls.__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_plain(tensor: Tensor) -> bool:
    """True if the elements lie in strided memory of the tensor's own.

    Do not ask anything else about a tensor for which it is False.
    """
    if is_wrapper(type(tensor)) or is_lazy(tensor):
        return False
    return tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_nested


def is_dense(tensor: Tensor) -> bool:
    """True if ``tensor`` covers its memory without gaps or overlaps, in any order of dimensions (channels_last too)."""
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def overlaps_itself(tensor: Tensor) -> bool:
    """True if elements of ``tensor`` lie in the same memory, as an expanded one's do."""
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
    reach = 0  # of the dimensions inside
    for stride, size in () if tensor.numel() == 0 else dims:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in dims:
        places = places.unsqueeze(-1) + stride * torch.arange(size, device="cpu")
    return len(places.unique()) < places.numel()


Layout = tuple[torch.Size, tuple[int, ...]]
"""Shape and strides."""


def dense_layout(tensor: Tensor) -> Layout:
    """Shape and strides of ``tensor`` if it is dense, else its shape and the strides that make it contiguous."""
    if is_dense(tensor):
        return tensor.shape, tensor.stride()
    return tensor.shape, torch.empty(tensor.shape, device="meta").stride()


def slots_of(tensors: Iterable[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins in a flat index space, in which it has whole lines, and the size of that space."""
    slots, numel = [], 0
    for tensor in tensors:
        line = max(1, ALIGNMENT // tensor.element_size())
        slots.append(numel)
        numel += -(-tensor.numel() // line) * line
    return slots, numel


def views_of(flat: Tensor, layouts: Sequence[Layout], slots: Sequence[int]) -> list[Tensor]:
    """The tensors of these layouts that begin at ``slots`` in ``flat``."""
    return [flat.as_strided(*layout, slot) for layout, slot in zip(layouts, slots, strict=True)]


def has_memory(tensor: Tensor) -> bool:
    """False if a strided tensor's storage was resized to nothing: PyTorch's own kernels would write to address 0."""
    return tensor.numel() == 0 or tensor.data_ptr() != 0


def has_grad_dtype(p: Tensor) -> bool:
    """Whether autograd gives a parameter gradients of another dtype than its own (PyTorch 2.10)."""
    return getattr(p, "grad_dtype", None) not in (None, p.dtype)


def allocated(tensor: Tensor) -> Tensor:
    """Return ``tensor``, which was just made for kernels to read or write.

    Raises:
        RuntimeError: it has no memory, so that kernels would be given the address 0.
    """
    if is_wrapper(type(tensor)):
        raise RuntimeError(
            f"a torch dispatch mode has made a {type(tensor).__name__} where memory was needed: make the optimizer, "
            "take its steps and copy statistics outside FakeTensorMode"
        )
    return tensor


def rejects_memory(tensor: Tensor) -> str | None:
    """Why the elements of ``tensor`` cannot be read and written at its address, or None."""
    if is_wrapper(type(tensor)):
        return f"a {type(tensor).__name__}, whose elements do not lie in memory of its own"
    if tensor.is_neg() or tensor.is_conj():
        return (
            "a tensor whose sign or conjugation is still to be applied "
            "(is_neg() or is_conj(): see resolve_neg, resolve_conj)"
        )
    return None


def signature(tensor: Tensor) -> tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]:
    """What must be the same about a tensor when its address is taken.

    The stride of a dimension of at most one element does not matter.
    """
    empty = tensor.numel() == 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    strides = tuple(0 if empty or size == 1 else stride for size, stride in sizes)
    return tensor.dtype, tensor.device, tensor.shape, strides


def overlapping(tensors: Sequence[Tensor]) -> set[int]:
    """The indices of the tensors whose memory reaches into that of another one of the same device."""
    spans = sorted((str(t.device), *_span(t), i) for i, t in enumerate(tensors) if is_plain(t) and t.numel() > 0)
    found: set[int] = set()
    furthest: tuple[str, int, int] | None = None  # device, end and index of the span that reaches furthest so far
    for device, begin, end, index in spans:
        if furthest is not None and furthest[0] == device and begin < furthest[1]:
            found |= {furthest[2], index}
        if furthest is None or furthest[0] != device or end > furthest[1]:
            furthest = (device, end, index)
    return found


def _span(tensor: Tensor) -> tuple[int, int]:
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
