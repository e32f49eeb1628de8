"""The ``torch`` backend: plain PyTorch, for every device, dtype (complex included) and layout."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..amp import Scaling, inverse_scale
from ..devices import can_capture, check_whole_step, is_capturing, never_ran
from ..rounding import ROUNDED
from ..steps import RULES, NotFused, Rule, wrong_state
from . import tensor_lists
from .bucket import (
    NO_LONGER_LAID_OUT,
    Backend,
    Bucket,
    GroupOptions,
    ParameterError,
    StepOptions,
    check_direction,
    shape_changed,
    step_gradient,
)
from .columns import all_none, local_tensor, state_tensors, tensor_now
from .memory import is_wrapper, signature
from .tensor_lists import (
    asam_t,
    compute_dtype,
    copy_all,
    materialized,
    perturb_tensors,
    rounded,
    scale_of,
    squared_norm,
    step_tensors,
    step_wide,
    to_dtype,
)


class TorchBucket(Bucket):
    backend = "torch"
    steps = frozenset(rule.name for rule in RULES)

    def __init__(self, tensors: Sequence[Tensor], groups: Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(tensors, groups, *args, **kwargs)
        self._expected = [signature(tensor) for tensor in self.tensors]
        self._locations = array("Q")
        self._along: list[Tensor | None] = [None] * len(self.tensors)
        self._saved = [False] * len(self.tensors)
        self._states: dict[str, list[Tensor | None]] = {}
        self.device_counters = self.host_counters = False

    @property
    def num_partials(self) -> int:
        return 1

    def _is_as_built(self) -> bool:
        if self.has_wrappers:
            self.tensors = list(map(tensor_now, self.sources, self.tensors))
        locations = array("Q", map(Tensor.data_ptr, self.tensors))
        self.moved = self.moved or locations != self._locations
        self._locations = locations
        return [signature(tensor) for tensor in self.tensors] == self._expected

    # ---- First step --------------------------------------------------------------------------------------------------

    def collect(self, options: GroupOptions, along: list[Tensor | None] | None = None) -> bool:
        if not self._is_as_built():
            return False
        for index, (tensor, group) in enumerate(zip(self.tensors, self.groups, strict=True)):
            direction: Tensor | None = None
            if options.perturb[group]:
                direction = self.gradient_of(index) if along is None else local_tensor(along[index])
            if direction is not None:
                check_direction(direction, tensor, self.sources[index])
                if self.dtype.itemsize == 1:
                    raise ParameterError(
                        self.sources[index],
                        f"is {self.dtype}, in which PyTorch cannot add: train it in another dtype, or put it in a "
                        "group with perturb=False and use a base optimizer that supports it",
                    )
                if is_wrapper(type(direction)):
                    direction = torch.empty_like(tensor, requires_grad=False).copy_(direction.detach())
            self._along[index] = direction
        return True

    def _participants(self) -> list[tuple[int, list[Tensor], list[Tensor], list[Tensor]]]:
        """For each group that takes part: the group, its tensors with a direction, their backups, the directions."""
        found: dict[int, tuple[int, list[Tensor], list[Tensor], list[Tensor]]] = {}
        for index, (group, direction) in enumerate(zip(self.groups, self._along, strict=True)):
            if direction is not None and direction.numel() > 0:
                _, weights, backups, directions = found.setdefault(group, (group, [], [], []))
                weights.append(self.tensors[index].detach())
                backups.append(self.backups[index])
                directions.append(direction.detach())
        return list(found.values())

    @torch.no_grad()
    def grad_norm(self, options: GroupOptions, partials: Tensor) -> None:
        dtype = compute_dtype(self.dtype)
        sums: list[Tensor] = []
        for group, weights, _, directions in self._participants():
            _, eta, adaptive = options.of(group)
            terms = to_dtype(directions, dtype)
            if adaptive:
                terms = list(torch._foreach_mul(asam_t(to_dtype(weights, dtype), eta), terms))
            sums.append(squared_norm(terms, partials.dtype))
        if sums:
            partials.copy_(torch.stack(sums).sum())
        else:
            partials.zero_()

    @torch.no_grad()
    def perturb(self, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> None:
        norm.copy_(partials.sum().sqrt())
        # Decided on the device: reading here what a GPU has yet to compute would wait for it.
        finite = None if tensor_lists.is_on_host(norm) else norm.isfinite()
        moves = finite is not None or math.isfinite(float(norm))
        participants = self._participants()
        for _, weights, backups, _ in participants:  # all before any is moved: they may share memory
            torch._foreach_copy_(backups, weights)
        self._saved = [direction is not None and direction.numel() > 0 for direction in self._along]
        self._recorded = is_capturing(self.device) if can_capture(self.device) else None
        for group, weights, backups, directions in participants if moves else ():
            rho, eta, adaptive = options.of(group)
            scale = scale_of(rho, norm + eps, compute_dtype(self.dtype))
            at_once = 1 if self.shared else len(weights)  # shared: one by one, each by the e that belongs to w
            for i in range(0, len(weights), at_once):
                part = (weights[i : i + at_once], backups[i : i + at_once], directions[i : i + at_once])
                perturb_tensors(*part, scale, eta if adaptive else None, finite, options.rounding_key)
        self._along = [None] * len(self.tensors)

    # ---- Backup ------------------------------------------------------------------------------------------------------

    def saved(self) -> list[int]:
        return [index for index, saved in enumerate(self._saved) if saved]

    @torch.no_grad()
    def save(self) -> bool:
        if not self._is_as_built():
            return False
        torch._foreach_copy_(self.backups, [tensor.detach() for tensor in self.tensors])
        self._saved, self._recorded = [True] * len(self.tensors), None
        return True

    @torch.no_grad()
    def restore(self, release: bool = True) -> None:
        if any(self._saved) and never_ran(self._recorded, self.device):
            self.release()
            return
        self._is_as_built()
        error: ParameterError | None = None
        # .data keeps the version: autograd may have saved a BatchNorm buffer, which gets back the value it had then.
        tensors, backups = [], []
        for index in self.saved():
            tensor, backup = self.tensors[index].data, self.backups[index]
            if tensor.shape != backup.shape:
                error = shape_changed(self.sources[index], backup, tensor)
                continue
            tensors.append(tensor)
            backups.append(backup)
        copy_all(tensors, backups)
        if release:
            self.release()
        if error is not None:
            raise error

    def release(self) -> None:
        self._saved = [False] * len(self.tensors)

    # ---- Second step -------------------------------------------------------------------------------------------------

    def share_saved(self, source: Bucket) -> None:
        assert isinstance(source, TorchBucket)
        pairs = zip(source._saved, source.params, strict=True)
        self._saved = [was_saved for was_saved, params in pairs for _ in params]
        self._recorded = source._recorded

    def prepare_step(self, state: Any, options: StepOptions) -> None:
        if not self._is_as_built() or any(tensor.is_neg() or tensor.is_conj() for tensor in self.tensors):
            raise NotFused(NO_LONGER_LAID_OUT)
        for index, source in enumerate(self.sources):
            self._along[index] = None if source.grad is None else step_gradient(self, index)
        if options.learning_rates:
            raise NotFused("the torch backend reads learning rates on the host")
        pairs = zip(self.groups, self._along, strict=True)
        takes = [0 if grad is None else options.masks[group] for group, grad in pairs]
        for k, name in enumerate(options.rule.all_names):
            found = state_tensors(state, self.sources, takes, 1 << k, name)
            if isinstance(found, int):
                raise wrong_state(name, missing=True)
            self._states[name] = found
        self._check_states(options.rule)

    def _check_states(self, rule: Rule) -> None:
        for name in rule.states:
            pairs = zip(self._states[name], self.tensors, strict=True)
            if not all(state is None or _is_like(state, tensor) for state, tensor in pairs):
                raise wrong_state(name, missing=False)
        steps = [] if rule.counter is None else self._states[rule.counter]
        if any(step is not None and step.device.type != "cpu" for step in steps):
            raise NotFused("the torch backend reads step counters on the host")
        self.host_counters = not all_none(steps)

    def with_gradient(self) -> list[int]:
        return [index for index, grad in enumerate(self._along) if grad is not None]

    @torch.no_grad()
    def restore_and_step(self, options: StepOptions, scaling: Scaling) -> None:
        """Restore, then step group by group, with saved tensors apart from others.

        If a step is interrupted, a saved tensor is put back. One that is not saved must be stepped as a whole.
        """
        if any(self._saved):
            check_whole_step(self._recorded, self.device)
        self.restore(release=False)
        inverse = None if scaling.grad_scale is None else inverse_scale(scaling.grad_scale).to(self.device)
        members: dict[tuple[int, bool], list[tuple[int, Tensor]]] = {}
        for index, grad in enumerate(self._along):
            if grad is not None:
                members.setdefault((self.groups[index], self._saved[index]), []).append((index, grad.detach()))
        for (group, saved), entries in members.items():
            indices = [index for index, _ in entries]
            grads = to_dtype([materialized(grad) for _, grad in entries], compute_dtype(self.dtype))
            if inverse is not None:
                grads = list(torch._foreach_mul(grads, inverse))
            self._step_group(options, group, indices, grads, saved)
        self.release()
        self._along = [None] * len(self.tensors)

    def _step_group(
        self, options: StepOptions, group: int, indices: list[int], grads: list[Tensor], saved: bool
    ) -> None:
        weights = [self.tensors[i].detach() for i in indices]
        found = {name: [t for i in indices if (t := self._states[name][i]) is not None] for name in self._states}
        names = [name for name, tensors in found.items() if tensors]

        def step(fused: bool, w: list[Tensor], g: list[Tensor], *columns: list[Tensor]) -> None:
            states: dict[str, list[Tensor]] = {name: [] for name in found}
            states |= dict(zip(names, columns, strict=True))
            options.rule.step(options.of(group), w, g, states, fused)

        columns = [weights, grads, *(found[name] for name in names)]
        if self.dtype in ROUNDED:
            moved, backups = step_wide(step, columns, options.rule.has_fused), [self.backups[i] for i in indices]
            torch._foreach_copy_(weights, rounded(moved, backups, options.rounding_key))
        else:
            step_tensors(step, columns, saved, options.rule.has_fused)


class TorchBackend(Backend):
    name = "torch"
    bucket = TorchBucket

    def unavailable(self) -> str | None:
        return None

    def rejects(self, tensor: Tensor, arithmetic: bool = True) -> str | None:
        return None


def _is_like(state: Tensor, tensor: Tensor) -> bool:
    facts = (tensor.shape, tensor.dtype, tensor.device)
    return state.layout == torch.strided and (state.shape, state.dtype, state.device) == facts


BACKEND = TorchBackend()
