"""``flatten=True``: parameters and gradients of one device and dtype as views of two flat buffers.

The kernels then see one row per parameter group instead of one per parameter, and ``zero_grad`` is one memset.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from .backends.base import check_dense_gradient
from .bucket import dense_layout, padded_size


class FlatStorage:
    """Moves ``params`` into one flat buffer, and their gradients into another of the same layout.

    Every parameter's address changes here, once. Slots are in the order of ``params``, so parameters of one group must be neighbours.
    Gradients are views from the start (zeros where there was none), except those of parameters that do not require one.

    Args:
        params: leaf tensors of one device and dtype.
        groups: for each parameter the index of its group; ascending.
    """

    def __init__(self, params: Sequence[Tensor], groups: Sequence[int]) -> None:
        self.params = list(params)
        slots, numel = [], 0
        for p in self.params:
            slots.append(numel)
            numel += padded_size(p.numel(), p.element_size())
        # Zeros, so that the padding between slots adds nothing to the norm and is not moved.
        self.weights = torch.zeros(numel, dtype=params[0].dtype, device=params[0].device)
        self.grads = torch.zeros_like(self.weights)
        layouts = [dense_layout(p) for p in self.params]
        self.weight_views = [self.weights.as_strided(*layout, slot) for layout, slot in zip(layouts, slots, strict=True)]
        self.grad_views = [self.grads.as_strided(*layout, slot) for layout, slot in zip(layouts, slots, strict=True)]
        for p, view in zip(self.params, self.weight_views, strict=True):
            view.copy_(p.detach())
            p.data = view
        self._addresses = [view.data_ptr() for view in self.weight_views]
        # False where .grad is None and the slot is known to hold zeros.
        self.attached = [False] * len(self.params)
        for index, p in enumerate(self.params):
            if p.grad is not None:
                self._adopt(index, p.grad)
            elif p.requires_grad:
                self._attach(index)

        self.row_groups: list[int] = []
        self.rows: list[Tensor] = []
        self.row_params: list[list[Tensor]] = []
        bounds = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
        for begin, end in zip(bounds, [*bounds[1:], len(self.params)], strict=True):
            first, last = slots[begin], numel if end == len(self.params) else slots[end]
            row = self.weights[first:last]
            row.grad = self.grads[first:last]
            self.rows.append(row)
            self.row_groups.append(groups[begin])
            self.row_params.append(self.params[begin:end])

    def intact(self) -> bool:
        """True if every parameter still lies where it was put."""
        return list(map(Tensor.data_ptr, self.params)) == self._addresses

    def write_back(self, touched: set[int]) -> list[str]:
        """Bring restored weights to parameters that were given other memory since (``touched``: ids of those that had been moved).

        Returns a description of each parameter whose shape has changed, which cannot be restored.
        """
        lost = []
        for p, view, address in zip(self.params, self.weight_views, self._addresses, strict=True):
            if id(p) not in touched or (p.data_ptr() == address and p.shape == view.shape):
                continue
            if p.shape == view.shape:
                p.data.copy_(view)
            else:
                lost.append(f"{tuple(view.shape)} -> {tuple(p.shape)}")
        return lost

    def collect_grads(self) -> None:
        """Bring every gradient into the flat buffer: one that was replaced is copied and attached again, the slot of a missing one is zeroed.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        grads = [p.grad for p in self.params]
        if all(map(is_, grads, self.grad_views)):
            return
        for index, (grad, view) in enumerate(zip(grads, self.grad_views, strict=True)):
            if grad is None:
                if self.attached[index]:
                    view.zero_()
                    self.attached[index] = False
            elif grad is not view:
                self._adopt(index, grad)

    def zero_grad(self) -> None:
        """Zero all gradients and attach those that are missing; a parameter that requires none loses its gradient."""
        self.grads.zero_()
        for index, p in enumerate(self.params):
            if p.requires_grad:
                if p.grad is not self.grad_views[index]:
                    self._attach(index)
            elif p.grad is not None:
                p.grad = None
                self.attached[index] = False

    def _adopt(self, index: int, grad: Tensor) -> None:
        check_dense_gradient(grad, self.params[index])
        self.grad_views[index].copy_(grad.detach())
        self._attach(index)

    def _attach(self, index: int) -> None:
        self.params[index].grad = self.grad_views[index]
        self.attached[index] = True
