"""``flatten=True``: parameters and gradients of one device and dtype as views of two flat buffers.

The kernels then see one tensor per parameter group instead of one per parameter, and ``zero_grad`` is one memset.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from ..backends import Backend, Bucket, choose
from ..backends.bucket import ParameterError, check_direction, shape_changed
from ..backends.columns import make_gather
from ..backends.memory import allocated, dense_layout, slots_of, views_of
from .in_place import InPlace, Member

_requires_grad = attrgetter("requires_grad")


def _addresses(tensors: Sequence[Tensor]) -> array[int]:
    return array("Q", [tensor.data_ptr() if tensor.numel() > 0 else 0 for tensor in tensors])


class FlatBuffers:
    """Moves ``params`` into one flat buffer, and their gradients into another of the same layout.

    Every parameter's address changes here, once. Slots are in the order of ``params``, so parameters of one group must
    be neighbours. Gradients are views from the start (zeros where there was none), except those of parameters that do
    not require one.

    Args:
        params: leaf tensors of one device and dtype.
        groups: for each parameter the index of its group; ascending.
    """

    def __init__(self, params: Sequence[Tensor], groups: Sequence[int]) -> None:
        self.params = list(params)
        self._slots, numel = slots_of(self.params)
        # Zeros, so that the padding between slots adds nothing to the norm and is not moved.
        self.weights = allocated(torch.zeros(numel, dtype=params[0].dtype, device=params[0].device))
        self.grads = torch.zeros_like(self.weights)
        layouts = [dense_layout(p) for p in self.params]
        self.weight_views = views_of(self.weights, layouts, self._slots)
        self.grad_views = views_of(self.grads, layouts, self._slots)
        for p, view in zip(self.params, self.weight_views, strict=True):
            view.copy_(p.detach())
            p.data = view
        self._gather = make_gather(self.params, self.params, [0] * len(self.params))
        self._weight_places = _addresses(self.weight_views)
        self._grad_places = _addresses(self.grad_views)
        self._found = array("Q", self._weight_places)
        self._found_grads = array("Q", self._grad_places)
        # False where .grad is None and the slot is known to hold zeros.
        self.attached = [False] * len(self.params)
        for index, p in enumerate(self.params):
            if p.grad is not None:
                self._adopt(index, p.grad)
            elif p.requires_grad:
                self._attach(index)

        self.run_groups: list[int] = []
        self.runs: list[Tensor] = []
        self.run_params: list[list[Tensor]] = []
        bounds = [*self._slots, numel]
        for group in dict.fromkeys(groups):
            begin, end = bisect_left(groups, group), bisect_right(groups, group)
            run = self.weights[bounds[begin] : bounds[end]]
            run.grad = self.grads[bounds[begin] : bounds[end]]
            self.runs.append(run)
            self.run_groups.append(group)
            self.run_params.append(self.params[begin:end])

    def intact(self) -> bool:
        """True if every parameter still lies where it was put, in the same layout."""
        return not self._gather.weights(self._found) and self._found == self._weight_places

    def in_place(self) -> tuple[bool, bool]:
        """Whether every parameter, and whether every gradient, lies where it was put, in one look.

        Only memory counts, not objects: ``model.to()`` gives the same ``.grad`` other memory.
        """
        changed, odd = self._gather.collect(self._found, self._found_grads)
        weights = not changed and self._found == self._weight_places
        return weights, not odd and self._found_grads == self._grad_places

    def release_frozen(self) -> None:
        """Set to None the gradients of parameters that have been frozen since these were zeroed."""
        if all(map(_requires_grad, self.params)):
            return
        for index, (p, view) in enumerate(zip(self.params, self.grad_views, strict=True)):
            if not p.requires_grad and p.grad is view and not view.any():
                p.grad = None
                self.attached[index] = False

    def write_back(self, perturbed: set[int]) -> ParameterError | None:
        """As :meth:`Flat.write_back`; ``perturbed``: ids of parameters."""
        error: ParameterError | None = None
        for p, view in zip(self.params, self.weight_views, strict=True):
            if id(p) not in perturbed or (
                p.data_ptr() == view.data_ptr() and p.shape == view.shape and p.dtype == view.dtype
            ):
                continue
            if p.shape == view.shape:
                p.data.copy_(view)
            else:
                error = shape_changed(p, view, p)
        return error

    def collect_grads(self) -> None:
        """Bring every gradient into the flat buffer: one that was replaced is copied and attached again, the slot of a
        missing one is zeroed.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        for index, (p, view) in enumerate(zip(self.params, self.grad_views, strict=True)):
            grad = p.grad
            if grad is None:
                if self.attached[index]:
                    view.zero_()
                    self.attached[index] = False
            elif not self._in_place(index, grad):
                self._adopt(index, grad)

    def _in_place(self, index: int, grad: Tensor) -> bool:
        view = self.grad_views[index]
        return grad is view and self._grad_places[index] == (view.data_ptr() if view.numel() > 0 else 0)

    def zero_grad(self) -> None:
        """Zero all gradients and attach those that are missing; a parameter that requires none loses its gradient.

        Parameters that were moved out of the flat buffer stay where they are, with gradients of zeros.
        """
        self.grads.zero_()
        weights, grads = self.in_place()
        if weights and grads and all(map(_requires_grad, self.params)):
            return
        for index, p in enumerate(self.params):
            if not weights:
                if p.grad is not None:
                    p.grad.detach().zero_()
            elif p.requires_grad:
                if p.grad is None or not self._in_place(index, p.grad):
                    self._attach(index)
            elif p.grad is not None:
                p.grad = None
                self.attached[index] = False

    def _adopt(self, index: int, grad: Tensor) -> None:
        check_direction(grad, self.params[index], self.params[index])
        self._place(index).copy_(grad.detach())
        self._attach(index)

    def _attach(self, index: int) -> None:
        self.params[index].grad = self._place(index)
        self.attached[index] = True

    def _place(self, index: int) -> Tensor:
        """The view of a parameter's slot of gradients: a new one where this very object was given other memory, as
        ``model.to()`` and ``p.grad.data = ...`` do.
        """
        view = self.grad_views[index]
        if self._grad_places[index] and view.data_ptr() != self._grad_places[index]:
            view = self.grads.as_strided(*dense_layout(self.weight_views[index]), self._slots[index])
            self.grad_views[index] = view
        return view


class Flat(InPlace):
    """Parameters in flat buffers, one pair of them for each bucket.

    Args:
        backend: name of the backend to force, or None.
    """

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        self.buffers: list[FlatBuffers] = []
        self._by_parameter: dict[Bucket, Bucket] = {}

    def choose(self, tensor: Tensor, backend: str | None) -> Backend:
        # A flat buffer is dense whatever its parameters were.
        return choose(torch.empty(0, dtype=tensor.dtype, device=tensor.device), backend)

    def buckets(self, members: Sequence[tuple[Backend, bool, Sequence[Member]]]) -> list[Bucket]:
        """Keep the buffers whose parameters are all in place and in their group; flatten the others' and new
        parameters.
        """
        group_of = {id(p): group for _, _, of_bucket in members for p, group in of_bucket}
        kept: list[FlatBuffers] = []
        for flat in self.buffers:
            groups = [group for group, params in zip(flat.run_groups, flat.run_params, strict=True) for _ in params]
            if flat.intact() and [group_of.get(id(p)) for p in flat.params] == groups:
                kept.append(flat)
        placed = {id(p) for flat in kept for p in flat.params}
        for _, _, of_bucket in members:
            fresh = [(p, group) for p, group in of_bucket if id(p) not in placed]
            if fresh:
                kept.append(FlatBuffers([p for p, _ in fresh], [group for _, group in fresh]))
        self.buffers = kept
        return [choose(flat.runs[0], self.backend).bucket(flat.runs, flat.run_groups, flat.run_params) for flat in kept]

    def held(self) -> set[int]:
        return {id(p) for flat in self.buffers for p in flat.params}

    def step_buckets(self, buckets: list[Bucket]) -> list[Bucket] | None:
        if not self._intact():
            return None
        if list(self._by_parameter) != buckets:
            self._by_parameter = {bucket: bucket.by_parameter() for bucket in buckets}
        return list(self._by_parameter.values())

    def collect(self, own_gradient: bool) -> bool:
        found = [flat.in_place() for flat in self.buffers]
        if not all(weights for weights, _ in found):
            return False
        for flat, (_, grads) in zip(self.buffers, found, strict=True):
            if not grads:
                flat.collect_grads()
        return True

    def _intact(self) -> bool:
        return all(flat.intact() for flat in self.buffers)

    def release_frozen(self) -> None:
        for flat in self.buffers:
            flat.release_frozen()

    def write_back(self, perturbed: Sequence[Tensor]) -> ParameterError | None:
        if self._intact():
            return None
        ids = set(map(id, perturbed))
        errors = [flat.write_back(ids) for flat in self.buffers]
        return next((error for error in errors if error is not None), None)

    def zero_grad(self) -> None:
        for flat in self.buffers:
            flat.zero_grad()
