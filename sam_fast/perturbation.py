"""The perturbation of one optimizer's parameters: its buckets, the norm over all of them, perturb and restore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from .amp import UNSCALED, Scaling
from .backends import BACKENDS, Backend, Bucket, GroupOptions, StepOptions, forced
from .backends.bucket import ParameterError
from .backends.columns import all_none, grad_of, local_tensor, same_objects
from .backends.memory import has_grad_dtype, is_plain, is_wrapper, overlapping, overlaps_itself
from .norm import Norm
from .options import name_of
from .steps import NotFused
from .storage import Flat, InPlace, Member, is_dtensor, sharded_storage

ParamGroups = Sequence[dict[str, Any]]

_others: list[ref[Perturbation]] = []
"""The perturbations in this process that may be active now."""


def _takes_part(p: Tensor, perturb: bool) -> bool:
    """Whether a bucket must hold a parameter: it has a gradient, or may get one.

    Parameters without a gradient that are frozen, on the meta device, sparse, quantised or yet to be materialised are
    left out.
    """
    if perturb and p.grad is not None:
        return True
    return (p.requires_grad or p.grad is not None) and is_plain(local_tensor(p) if is_dtensor(p) else p)


def forget_old_weights() -> None:
    """Drop autocast's casts of weights, and what ``parametrize.cached()`` keeps: both would hide ``w + e``."""
    torch.clear_autocast_cache()
    getattr(parametrize, "_cache", {}).clear()


class Perturbation:
    """Moves parameters to ``w + e`` and back to ``w``, over all parameters of all groups.

    Args:
        backend: name of the backend to force, or None.
        flatten: move parameters and gradients into flat buffers.
        eps: added to the norm before it divides rho.
        nested: it is restored before anything else happens, so it may move weights that another one has perturbed.
    """

    def __init__(self, backend: str | None, flatten: bool, eps: float, nested: bool = False) -> None:
        self.backend = backend
        self.flatten = flatten
        self.eps = eps
        self.nested = nested
        self.maximize = False  # in groups that do not say
        self.active = False
        self.buckets: list[Bucket] = []
        self.storage: InPlace = Flat(backend) if flatten else InPlace()
        self.norm = Norm()
        self.measured = False
        self.left_out: dict[Tensor, bool] = {}  # parameters in no bucket; whether the group of each is perturbed
        self._param_groups: ParamGroups = ()
        self._known: list[list[Tensor]] = []
        self._tensors: list[Tensor] = []  # of all buckets
        self._shared: set[int] = set()  # which of these share memory with another
        self._repeats = False  # a parameter is listed twice
        self._began = False  # a backup has been allocated
        self._ref = ref(self)

    def holds(self, dtypes: Sequence[torch.dtype]) -> bool:
        """Whether there are parameters of one of these dtypes."""
        return any(bucket.dtype in dtypes for bucket in self.buckets)

    # ---- Buckets -----------------------------------------------------------------------------------------------------

    def prepare(self, param_groups: ParamGroups) -> None:
        """Make the buckets fit ``param_groups``; nothing happens if they do."""
        self._param_groups = param_groups
        if not self.fits(param_groups):
            self._build(param_groups)
            self._known = [list(group["params"]) for group in param_groups]

    def fits(self, param_groups: ParamGroups) -> bool:
        """True if the buckets are those of these groups and parameters."""
        if len(self._known) != len(param_groups):
            return False
        for group, known in zip(param_groups, self._known, strict=True):  # no generator: this is asked at every step
            params = group["params"]
            if not same_objects(params if params.__class__ is list else list(params), known):
                return False
        return True

    def _build(self, param_groups: ParamGroups) -> None:
        """Build buckets. If a parameter is refused, this raises before anything is changed."""
        members, left_out = self._members(param_groups)
        params = [p for p, _ in members]
        over_processes = sharded_storage(params)
        if self.flatten and over_processes is not None:
            raise ValueError(
                "flatten=True cannot move DTensor parameters, whose memory belongs to whoever has sharded them: "
                "use flatten=False"
            )
        storage: InPlace = self.storage if self.flatten else over_processes or InPlace()
        tensors = [storage.tensor(p) for p in params]
        shared = overlapping(tensors)
        if self.flatten:
            self._refuse_shared([*params, *left_out], param_groups)
            self._refuse_wide_gradients(params, param_groups)
        alike: dict[tuple[Any, ...], list[Member]] = {}
        for position, ((p, group), tensor) in enumerate(zip(members, tensors, strict=True)):
            is_shared = position in shared
            backend = self._choose_for_shared() if is_shared else self._choose(storage, p, tensor)
            # Parameters that are never perturbed have buckets of their own, which allocate no backup.
            perturbs = bool(param_groups[group]["perturb"])
            key = (backend, is_shared, tensor.device, tensor.dtype, storage.process_groups(p), perturbs)
            alike.setdefault(key, []).append((p, group))
        self.buckets = storage.buckets([(*key[:2], of_bucket) for key, of_bucket in alike.items()])
        self.storage, self._tensors, self._shared, self.left_out = storage, tensors, shared, left_out
        self._repeats = len(members) + len(left_out) < sum(len(group["params"]) for group in param_groups)
        self.norm = Norm(self.buckets, storage.process_wide, self.norm)

    def _members(self, param_groups: ParamGroups) -> tuple[list[Member], dict[Tensor, bool]]:
        """The parameters that take part; and the others, each with whether its group is perturbed."""
        members: list[Member] = []
        left_out: dict[Tensor, bool] = {}
        seen: set[int] = set()
        held = self.storage.held()
        for index, group in enumerate(param_groups):
            for p in group["params"]:
                if id(p) in seen:  # a parameter that is listed twice is one parameter
                    continue
                seen.add(id(p))
                if not _takes_part(p, group["perturb"]) and not (id(p) in held and is_plain(p)):
                    left_out[p] = bool(group["perturb"])
                    continue
                if (is_wrapper(p.__class__) and not is_dtensor(p)) or p.layout != torch.strided:
                    raise RuntimeError(
                        f"{name_of(p, param_groups)} has a gradient, but SAM cannot move it: its elements are not in "
                        f"strided memory ({type(p).__name__}, layout {p.layout}). Put it into a group with "
                        "perturb=False"
                    )
                if overlaps_itself(p):
                    raise ValueError(
                        f"elements of {name_of(p, param_groups)} share memory with each other, as after expand() "
                        f"(shape {tuple(p.shape)}, strides {p.stride()}), and cannot be moved apart: train the tensor "
                        "it is a view of, or a clone()"
                    )
                members.append((p, index))
        return members, left_out

    def _refuse_shared(self, params: Sequence[Tensor], param_groups: ParamGroups) -> None:
        shared = sorted(overlapping(params))
        if shared:
            names = ", ".join(name_of(params[i], param_groups) for i in shared)
            raise ValueError(f"flatten=True would separate parameters that share memory ({names}): use flatten=False")

    def _refuse_wide_gradients(self, params: Sequence[Tensor], param_groups: ParamGroups) -> None:
        for p in filter(has_grad_dtype, params):
            raise ValueError(
                f"flatten=True makes gradients of the parameters' dtypes, but {name_of(p, param_groups)} is "
                f"{p.dtype} with grad_dtype {p.grad_dtype}: use flatten=False"  # type: ignore[attr-defined]
            )

    def _choose(self, storage: InPlace, param: Tensor, tensor: Tensor) -> Backend:
        # The fused kernels read gradients in the parameter's dtype: float16 would lose the large ones and the small.
        if has_grad_dtype(param) and forced(self.backend) is None:
            return BACKENDS["torch"]
        return storage.choose(tensor, self.backend)

    def _choose_for_shared(self) -> Backend:
        # The fused kernels move all tensors at once; the torch backend backs all up, then moves one after the other.
        wanted = forced(self.backend)
        if wanted is not None and wanted is not BACKENDS["torch"]:
            raise ValueError(
                f"backend={wanted.name!r} was forced but does not support parameters that share memory: "
                "use backend='torch'"
            )
        return BACKENDS["torch"]

    # ---- First step --------------------------------------------------------------------------------------------------

    def perturb(self, param_groups: ParamGroups, rounding_key: int | None = None, own_gradient: bool = False) -> None:
        """Back the weights up and move them to ``w + e``. If this raises, the weights are as they were.

        Args:
            param_groups: those of the optimizer.
            rounding_key: the key of the stochastic rounding of ``w + e`` (:mod:`sam_fast.rounding`), or None.
            own_gradient: do not add up DTensor gradients that are partial sums.
        """
        self.prepare(param_groups)
        if not self.nested and _others != [self._ref]:  # most often it is the only one
            others = [other for known in _others if (other := known()) is not None and other.active]
            for other in others:
                self._refuse_perturbed(other, param_groups)
            _others[:] = [self._ref, *(other._ref for other in others)]
        if not self._began:
            self._leave_out_what_was_frozen(param_groups)
        options = GroupOptions(param_groups, rounding_key, self.maximize)
        try:
            if not self._collect(options, own_gradient):
                # Parameters have other memory, another dtype or layout (model.to(), p.data = ...): build the buckets
                # from what they are now.
                self._build(param_groups)
                if not self._collect(options, own_gradient):
                    raise RuntimeError("a parameter changes its device, dtype or layout while it is looked at")
        except ParameterError as error:
            raise self._named(error) from None
        perturbed = self.buckets
        if options.wanted is not None:  # some groups are not perturbed: a bucket of these alone needs no backup
            perturbed = [bucket for bucket in perturbed if any(options.perturb[group] for group in bucket.groups)]
        for bucket in perturbed:
            _ = bucket.backup  # allocated before anything moves
        self._began = True
        self._measure(options)
        self.active = True
        try:
            for bucket, _, home in self.norm.parts:
                if bucket not in perturbed:
                    home.measure()  # overwritten by any bucket of the same device that perturbs
            for bucket, _, home in self.norm.parts:
                if bucket in perturbed:
                    bucket.perturb(options, home.partials, self.eps, home.norm)
            self._mark_written(self._saved_params())
        except BaseException:
            self.restore()
            raise
        self.measured = True

    def _refuse_perturbed(self, other: Perturbation, param_groups: ParamGroups) -> None:
        """Raise RuntimeError if ``other`` has perturbed one of these parameters: whichever of the two restores last
        would undo the other's update, or leave its perturbation in the weights.
        """
        perturbed = set(map(id, other._saved_params()))
        for group in param_groups:
            for p in group["params"]:
                if group["perturb"] and p.grad is not None and id(p) in perturbed:
                    raise RuntimeError(
                        f"{name_of(p, param_groups)} is perturbed by another SAM: finish that one's step first, or "
                        "call its restore()"
                    )

    def _leave_out_what_was_frozen(self, param_groups: ParamGroups) -> None:
        """Drop what was frozen between constructor and first step: it needs no backup, and no step with zeros."""
        self.storage.release_frozen()
        frozen = (p.grad is None and not p.requires_grad for bucket in self.buckets for p in bucket.sources)
        if not self.flatten and any(frozen):
            self._build(param_groups)

    def _collect(self, options: GroupOptions, own_gradient: bool) -> bool:
        """Have the buckets look up where weights and gradients are. False if they must be built anew."""
        if not self.storage.collect(own_gradient):
            return False
        if self.left_out and self._left_out_has_gradient():
            takes_part = (_takes_part(p, perturb) for p, perturb in self.left_out.items() if p.grad is not None)
            if any(takes_part):
                return False
        moved = False
        for bucket in self.buckets:
            if not bucket.collect(options):
                return False
            moved = moved or bucket.moved
        # With flatten=True the tensors are flat buffers.
        return self.flatten or not moved or not (self._shares_anew() or self.storage.replaced())

    def _left_out_has_gradient(self) -> bool:
        return not all_none(list(map(grad_of, self.left_out)))

    def _shares_anew(self) -> bool:
        """Whether tensors share memory now that did not when the buckets were built, or the other way round."""
        if overlapping(self._tensors) != self._shared:
            return True
        replaced = self.storage.replaced()  # then the next first step builds the buckets anew
        for bucket in self.buckets:
            bucket.moved = replaced
        return False

    def norm_of_gradients(self, param_groups: ParamGroups) -> Tensor | None:
        """The norm over all gradients of all groups as they are now, perturbed or not: 0-d, on the first device.

        None if the buckets do not hold all of them.
        """
        if not self.fits(param_groups) or self._left_out_has_gradient():
            return None
        everything = GroupOptions([{"rho": 0.0, "eta": 0.0, "adaptive": False, "perturb": True}] * len(param_groups))
        try:
            if not self._collect(everything, False):
                return None
        except ParameterError as error:
            raise RuntimeError(
                f"clip_grad_norm cannot clip the gradient of {name_of(error.param, param_groups)}, which is sparse, in "
                "float8 or of another shape than its parameter: build the layer with sparse=False, or leave "
                "clip_grad_norm out"
            ) from None
        return self._measure(everything).own_norm()

    def _measure(self, options: GroupOptions) -> Norm:
        """Have the buckets write their partial sums, and the processes exchange them. Returns the norm."""
        for bucket, partials, _ in self.norm.parts:
            bucket.grad_norm(options, partials)
        if self.storage.process_wide:
            self.storage.combine(self.norm.parts)
        self.norm.exchange()
        return self.norm

    # ---- Restore -----------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Write the weights back, bit for bit. What an interruption left undone, the next call does."""
        error: RuntimeError | None = None
        perturbed = self._saved_params()
        # In reverse: a bucket that shares memory with an earlier one has backed up what the earlier one had moved.
        for bucket in reversed(self.buckets):
            try:
                bucket.restore()
            except RuntimeError as raised:
                error = error or raised
        error = error or self.storage.write_back(perturbed)
        self._mark_written(perturbed)
        # A kernel that could not be launched has restored nothing.
        self.active = error is not None and bool(self._saved_params())
        if isinstance(error, ParameterError):
            raise self._named(error)
        if error is not None:
            raise error

    def _named(self, error: ParameterError) -> RuntimeError:
        return RuntimeError(f"{name_of(error.param, self._param_groups)} {error.problem}")

    def _saved_params(self) -> list[Tensor]:
        if len(self.buckets) == 1:
            return self.buckets[0].saved_params()
        return [p for bucket in self.buckets for p in bucket.saved_params()]

    def _mark_written(self, params: list[Tensor]) -> None:
        """Tell autograd that kernels have written these weights, and drop what is cached from the old ones."""
        increment_version(self.storage.written(params) if self.storage.process_wide else params)
        forget_old_weights()

    def zero_grad(self, param_groups: ParamGroups) -> None:
        """With ``flatten=True``: zero the gradients in the flat buffers, and set the others to None."""
        self.storage.zero_grad()
        params = [*self.left_out] if self.fits(param_groups) else [p for group in param_groups for p in group["params"]]
        held = self.storage.held() if params else ()
        for p in params:
            if id(p) not in held:
                p.grad = None

    # ---- Second step -------------------------------------------------------------------------------------------------

    def step_buckets(self, param_groups: ParamGroups) -> list[Bucket]:
        """For each bucket the one that a fused second step works on. The tensors of that one are parameters.

        Raises:
            NotFused: there are none, or the parameters are not those of first_step, or one is listed twice.
        """
        buckets: list[Bucket] | None = self.buckets
        if self.flatten:
            buckets = self.storage.step_buckets(self.buckets)
        if buckets is None or not self.fits(param_groups):
            raise NotFused("parameters or groups are no longer those of first_step, or have left their flat buffer")
        if self._repeats:
            raise NotFused("a parameter is listed twice, and the base optimizer steps it twice")
        return buckets

    def check_step(self) -> None:
        """Raise NotFused if restoring and stepping must not be one pass over the buckets, now prepared for it."""
        if self._shared or (not self.flatten and any(bucket.moved for bucket in self.buckets) and self._shares_anew()):
            raise NotFused("parameters share memory, and must be stepped one after the other")
        if self.left_out and self._left_out_has_gradient():
            raise NotFused(
                "a parameter has a gradient now that had none in first_step, and was frozen or of a kind that SAM "
                "leaves alone"
            )

    def restore_and_step(self, buckets: Sequence[Bucket], options: Sequence[StepOptions], scaling: Scaling) -> None:
        """Restore and step the buckets of ``step_buckets()``, after their ``prepare_step``."""
        written: list[Tensor] = []
        for source, bucket in zip(self.buckets, buckets, strict=True):
            if bucket is not source:
                bucket.share_saved(source)
            written = [*written, *bucket.written_params()] if written else bucket.written_params()
        try:
            for source, bucket, of_bucket in zip(self.buckets, buckets, options, strict=True):
                bucket.restore_and_step(of_bucket, scaling if scaling is UNSCALED else scaling.on(bucket.device))
                if bucket is not source:
                    source.release()
        finally:
            self._mark_written(written)
        self.active = False
