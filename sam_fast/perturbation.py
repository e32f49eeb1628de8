"""The perturbation of one optimizer's parameters: which buckets there are, the norm over all of them, climbing and restoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .amp import Scaling
from .backends import BACKENDS, GroupOptions, choose, forced
from .backends.base import Backend, StateTensors, shape_changed
from .bucket import Bucket, is_plain, is_wrapper, overlapping
from .flat import FlatStorage
from .norm import NormSum, exchange_sums
from .options import name_of
from .sharded import ProcessGroups, Sharding, is_dtensor, local_tensor, sharding_of

ParamGroups = Sequence[dict[str, Any]]


_grad_of = Tensor.grad.__get__  # type: ignore[union-attr]  # without the search for the attribute


def _takes_part(p: Tensor, perturb: bool) -> bool:
    """Whether there must be a place for a parameter in a bucket: it has a gradient, or may get one.

    What is frozen, on the meta device, sparse, quantised or yet to be materialised, and has no gradient, is not looked into.
    """
    if perturb and p.grad is not None:
        return True
    return (p.requires_grad or p.grad is not None) and is_plain(local_tensor(p) if is_dtensor(p) else p)


def _announce(written: list[Tensor]) -> None:
    """Let autograd know of weights that kernels have written, and autocast, which keeps casts of the old ones while a region lasts."""
    increment_version(written)
    torch.clear_autocast_cache()


class Perturbation:
    """Climbs to ``w + e`` and comes back to ``w``, over all parameters of all groups.

    Args:
        backend: name of the backend to force, or None.
        flatten: move parameters and gradients into flat buffers.
        eps: added to the norm before it divides rho.
    """

    def __init__(self, backend: str | None, flatten: bool, eps: float) -> None:
        self.backend = backend
        self.flatten = flatten
        self.eps = eps
        self.active = False
        self.buckets: list[Bucket] = []
        self.flats: list[FlatStorage] = []
        self.sharding: Sharding | None = None  # None without DTensors
        self._sums: dict[torch.device, NormSum] = {}
        self._bucket_sums: list[tuple[Bucket, Tensor, NormSum]] = []
        self._known: list[list[Tensor]] = []
        self.left_out: list[Tensor] = []  # parameters that are in no bucket
        self._may_perturb: list[bool] = []  # for each of them, whether its group is perturbed
        self._rows: list[Tensor] = []
        self._shared: set[int] = set()  # which of the rows share memory with another
        self._places: list[bytes] = []  # where the rows were when that was looked up
        self._touched: list[Tensor] = []
        self.measured = False
        self._began = False  # a backup has been allocated
        self._by_parameter: dict[Bucket, Bucket] = {}

    @property
    def norm(self) -> Tensor:
        """The norm of the last climb: 0-d, on the first parameter's device."""
        for found in self._sums.values():
            return found.norm
        return torch.zeros((), dtype=torch.float64)

    def holds(self, dtypes: Sequence[torch.dtype]) -> bool:
        """Whether there are parameters of one of these dtypes."""
        return any(bucket.dtype in dtypes for bucket in self.buckets)

    # ---- Buckets ---------------------------------------------------------------------------------------------------------------------

    def prepare(self, param_groups: ParamGroups) -> None:
        """Make the buckets fit ``param_groups``; nothing happens if they do."""
        if not self.fits(param_groups):
            self._build(param_groups)
            self._known = [list(group["params"]) for group in param_groups]

    def fits(self, param_groups: ParamGroups) -> bool:
        """True if the buckets are those of these groups and parameters."""
        known = self._known
        return len(known) == len(param_groups) and all(
            len(group["params"]) == len(params) and all(map(is_, group["params"], params)) for group, params in zip(param_groups, known, strict=True)
        )

    def _build(self, param_groups: ParamGroups) -> None:
        """Build buckets. If a parameter is refused, this raises before anything is changed."""
        params: list[Tensor] = []
        groups: list[int] = []
        left_out: list[Tensor] = []
        may_perturb: list[bool] = []
        seen: set[int] = set()
        for index, group in enumerate(param_groups):
            for p in group["params"]:
                if id(p) in seen:  # a parameter that is listed twice is one parameter
                    continue
                seen.add(id(p))
                if not _takes_part(p, group["perturb"]):
                    left_out.append(p)
                    may_perturb.append(bool(group["perturb"]))
                    continue
                if (is_wrapper(p.__class__) and not is_dtensor(p)) or p.layout != torch.strided:
                    raise RuntimeError(
                        f"{name_of(p, param_groups)} has a gradient, but SAM cannot move it: its elements are not in strided memory "
                        f"({type(p).__name__}, layout {p.layout}). Put it into a group with perturb=False"
                    )
                params.append(p)
                groups.append(index)
        sharding = sharding_of(params, groups)
        if self.flatten and sharding is not None:
            raise ValueError("flatten=True cannot move DTensor parameters, whose memory belongs to whoever has sharded them: use flatten=False")
        rows = params if sharding is None else [sharding.row(p) for p in params]
        shared = overlapping(rows)
        if self.flatten:
            self._refuse_shared([*params, *left_out], param_groups)
        members: dict[tuple[torch.device, torch.dtype, Backend, bool, ProcessGroups], list[tuple[Tensor, int]]] = {}
        for position, (p, row, index) in enumerate(zip(params, rows, groups, strict=True)):
            process_groups = () if sharding is None else sharding.process_groups(p)
            is_shared = position in shared
            key = (row.device, row.dtype, self._choose(row, is_shared), is_shared, process_groups)
            members.setdefault(key, []).append((p, index))
        self.sharding = sharding
        if self.flatten:
            self._flatten(list(members.values()))
        else:
            self.buckets = [self._bucket(of_bucket, backend, shared) for (_, _, backend, shared, _), of_bucket in members.items()]
        self._rows, self._shared, self._places = rows, shared, []
        self.left_out, self._may_perturb = left_out, may_perturb
        self._build_sums()

    def _refuse_shared(self, params: Sequence[Tensor], param_groups: ParamGroups) -> None:
        shared = sorted(overlapping(params))
        if shared:
            names = ", ".join(name_of(params[i], param_groups) for i in shared)
            raise ValueError(f"flatten=True would separate parameters that share memory ({names}): use flatten=False")

    def _bucket(self, members: Sequence[tuple[Tensor, int]], backend: Backend, shared: bool) -> Bucket:
        params, groups = [p for p, _ in members], [group for _, group in members]
        if self.sharding is None:
            return Bucket(params, groups, backend, shared=shared)
        versioned = [self.sharding.versioned(p) for p in params]
        return Bucket([self.sharding.row(p) for p in params], groups, backend, versioned, shared=shared)

    def _choose(self, p: Tensor, shared: bool) -> Backend:
        if self.flatten:  # a flat buffer is dense whatever its parameters were
            return choose(torch.empty(0, dtype=p.dtype, device=p.device), self.backend)
        if not shared:
            return choose(p, self.backend)
        # The fused kernels move all rows at once; the torch backend backs all up, then moves one after the other.
        wanted = forced(self.backend)
        if wanted is not None and wanted is not BACKENDS["torch"]:
            raise ValueError(f"backend={wanted.name!r} was forced but does not support parameters that share memory: use backend='torch'")
        return BACKENDS["torch"]

    def _flatten(self, members: Sequence[list[tuple[Tensor, int]]]) -> None:
        """Keep the flat storages whose parameters are all still in place and in their group; flatten the others' and new parameters."""
        group_of = {id(p): group for rows in members for p, group in rows}
        kept: list[FlatStorage] = []
        for flat in self.flats:
            groups = [group for group, row in zip(flat.row_groups, flat.row_params, strict=True) for _ in row]
            if flat.intact() and [group_of.get(id(p)) for p in flat.params] == groups:
                kept.append(flat)
        placed = {id(p) for flat in kept for p in flat.params}
        for rows in members:
            fresh = [(p, group) for p, group in rows if id(p) not in placed]
            if fresh:
                kept.append(FlatStorage([p for p, _ in fresh], [group for _, group in fresh]))
        self.flats = kept
        self.buckets = [Bucket(flat.rows, flat.row_groups, choose(flat.rows[0], self.backend), flat.row_params) for flat in kept]

    def zero_flat_grads(self) -> None:
        """Zero the gradients in the flat buffers, and let go of those outside."""
        for flat in self.flats:
            flat.zero_grad()
        for p, _ in self._left_out_with_gradient():
            p.grad = None

    def step_buckets(self) -> list[Bucket] | None:
        """For each bucket the one that a fused second step works on, whose rows are parameters.

        None if there is no such: parameters have left their flat buffer.
        """
        if not self.flatten:
            return self.buckets
        if not all(flat.intact() for flat in self.flats):
            return None
        if list(self._by_parameter) != self.buckets:
            self._by_parameter = {bucket: bucket.by_parameter() for bucket in self.buckets}
        return list(self._by_parameter.values())

    def _build_sums(self) -> None:
        counts: dict[torch.device, int] = {}
        for bucket in self.buckets:
            counts[bucket.device] = counts.get(bucket.device, 0) + bucket.backend.num_partials(bucket)
        if self.sharding is not None:
            counts = dict.fromkeys(counts, 1)  # what the kernels read is the sum over all processes
        last = self._sums
        self._sums = {device: NormSum(device, own, len(counts) - 1) for device, own in counts.items()}
        for device, sums in self._sums.items():
            if device in last:
                sums.norm.copy_(last[device].norm)  # the last step's norm outlives a change of the groups
        self._bucket_sums = []
        used = dict.fromkeys(counts, 0)
        for bucket in self.buckets:
            if self.sharding is not None:
                sums = self._sums[bucket.device]
                self._bucket_sums.append((bucket, sums.partials.new_zeros(bucket.backend.num_partials(bucket)), sums))
                continue
            first = used[bucket.device]
            used[bucket.device] += bucket.backend.num_partials(bucket)
            sums = self._sums[bucket.device]
            self._bucket_sums.append((bucket, sums.partials[first : used[bucket.device]], sums))

    # ---- The step --------------------------------------------------------------------------------------------------------------------

    def _collect(self, options: GroupOptions, own_gradient: bool) -> bool:
        if self.sharding is not None and not self.sharding.attach_grads(options, own_gradient):
            return False
        for flat in self.flats:
            if not flat.intact():
                return False
            flat.collect_grads()
        if any(p.grad is not None and _takes_part(p, perturb) for p, perturb in self._left_out_with_gradient()):
            return False
        return all(bucket.backend.collect(bucket, options) for bucket in self.buckets) and self._shares_as_known()

    def _left_out_with_gradient(self) -> Iterator[tuple[Tensor, bool]]:
        if all(map(is_, map(_grad_of, self.left_out), repeat(None))):
            return iter(())
        return zip(self.left_out, self._may_perturb, strict=True)

    def _shares_as_known(self) -> bool:
        """Whether the same rows share memory as when the buckets were built. Looked up again whenever a row lies elsewhere."""
        if self.flatten:
            return True  # the rows are the flat buffers
        places = [bucket.backend.addresses(bucket) for bucket in self.buckets]
        if places != self._places:
            if overlapping(self._rows) != self._shared:
                return False
            self._places = places
        return True

    def why_not_fused(self) -> str | None:
        """Why restoring and stepping must not be one pass over the buckets, which have been collected for it; None if they may be."""
        if self._shared or not self._shares_as_known():
            return "parameters share memory, and must be stepped one after the other"
        if any(p.grad is not None for p, _ in self._left_out_with_gradient()):
            return "a parameter has a gradient now that had none in first_step, and was frozen or of a kind that SAM leaves alone"
        return None

    def climb(self, param_groups: ParamGroups, rounding_key: int | None = None, own_gradient: bool = False) -> None:
        """Back the weights up and move them to ``w + e``. If this raises, the weights are as they were.

        Args:
            param_groups: those of the optimizer.
            rounding_key: that of ``w + e``'s stochastic rounding (:mod:`sam_fast.rounding`), or None.
            own_gradient: DTensor gradients that are partial sums are not added up.
        """
        self.prepare(param_groups)
        if not self._began:
            self._leave_out_what_was_frozen(param_groups)
        options = GroupOptions(param_groups, rounding_key)
        if not self._collect(options, own_gradient):
            # Parameters were given other memory, a dtype or a layout (model.to(), p.data = ...): start from what they are now.
            self._build(param_groups)
            if not self._collect(options, own_gradient):
                raise RuntimeError("a parameter changes its device, dtype or layout while the optimizer looks at it")
        for bucket in self.buckets:
            _ = bucket.flat  # allocated before anything moves
        self._began = True
        for bucket, partials, _ in self._bucket_sums:
            bucket.backend.grad_norm(bucket, options, partials)
        if self.sharding is not None:
            self._combine_over_processes(self.sharding)
        exchange_sums(list(self._sums.values()))
        self.active = True
        try:
            for bucket, _, sums in self._bucket_sums:
                bucket.backend.perturb(bucket, options, sums.partials, self.eps, sums.norm)
            self._touched = self._saved_params()
            _announce(self._touched)
        except BaseException:
            self.restore()
            raise
        if self.sharding is not None:
            self.sharding.detach_grads()
        self.measured = True

    def _leave_out_what_was_frozen(self, param_groups: ParamGroups) -> None:
        """What was frozen between the constructor and the first climb needs no backup; nor does it step with a gradient of zeros."""
        for flat in self.flats:
            flat.release_frozen()
        if not self.flatten and any(p.grad is None and not p.requires_grad for bucket in self.buckets for p in bucket.owners):
            self._build(param_groups)

    def _combine_over_processes(self, sharding: Sharding) -> None:
        for sums in self._sums.values():
            sums.partials.zero_()
        sharding.combine(self._bucket_sums)

    def restore(self) -> None:
        """Write the weights back, bit for bit. What an interruption left undone, the next call does."""
        error: RuntimeError | None = None
        touched = self._touched or self._saved_params()
        for bucket in reversed(self.buckets):  # one that shares memory with an earlier one has backed up what that one had moved
            try:
                bucket.backend.restore(bucket)
            except RuntimeError as raised:
                error = error or raised
        if self.flats and not all(flat.intact() for flat in self.flats):
            ids = {id(p) for p in touched}
            lost = [text for flat in self.flats for text in flat.write_back(ids)]
            if lost:
                error = error or shape_changed(lost)
        if self.sharding is not None:
            lost = self.sharding.write_back({id(p) for p in touched})
            if lost:
                error = error or shape_changed(lost)
        _announce(touched)
        self._touched = []
        self.active = error is not None and bool(self._saved_params())  # a kernel that could not be launched has restored nothing
        if error is not None:
            raise error

    @contextmanager
    def own_step_grads(self) -> Iterator[bool]:
        """Inside, the rows of DTensors have their gradients, as all other rows always do. Yields False if they cannot."""
        if self.sharding is None:
            yield True
            return
        try:
            yield self.sharding.attach_step_grads()
        finally:
            self.sharding.detach_grads()

    def restore_and_step(
        self, operation: str, buckets: Sequence[Bucket], states: Sequence[StateTensors], scaling: Scaling, stepped: list[Tensor]
    ) -> None:
        """Run ``restore_sgd`` or ``restore_adam`` on every one of ``step_buckets()``; they and ``states`` have been collected.

        ``stepped``: the parameters that have a gradient, which the kernels write whether they were perturbed or not.
        """
        touched = self._touched or self._saved_params()
        try:
            for source, bucket, state in zip(self.buckets, buckets, states, strict=True):
                if bucket is not source:
                    bucket.backend.share_saved(bucket, source)
                getattr(bucket.backend, operation)(bucket, state, scaling.on(bucket.device))
                if bucket is not source:
                    source.backend.release(source)
        finally:
            same = len(touched) == len(stepped) and all(map(is_, touched, stepped))
            _announce(touched if same else [*touched, *stepped])
        self._touched = []
        self.active = False

    def _saved_params(self) -> list[Tensor]:
        params: list[Tensor] = []
        for bucket in self.buckets:
            rows = bucket.backend.saved(bucket)
            if rows is None:
                params += bucket.all_params
            else:
                for row in rows:
                    params += bucket.params[row]
        return params
