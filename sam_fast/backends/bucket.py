"""Buckets: tensors of one device and dtype in one flat index space. Their methods are the interface of all backends.

By default the tensors are the parameters where they lie; with ``flatten=True`` each is one group's part of a flat
buffer (:mod:`sam_fast.storage.flat`). Every tensor has a *slot* in the bucket's index space, which starts on a 64-byte
boundary. The tensors are cut into *chunks*, so that one launch serves tensors of every size, of all parameter groups.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..amp import Scaling
from ..options import make_plain
from ..steps import NotFused, Rule
from .columns import GradientOf, grad_of
from .memory import allocated, dense_layout, is_plain, is_wrapper, slots_of, views_of

CHUNK = 16384
"""Elements. Small enough to balance over threads, large enough that a chunk's overhead vanishes. A multiple of 64."""


class GroupOptions:
    """SAM's options of all parameter groups, read once per step.

    ``values`` is a float64 table with ``rho, eta, adaptive`` for each group, as ``struct Group`` in csrc/table.h; rho
    is negative where the objective is maximized: as the group says, else ``maximize``. ``perturb[i]`` says whether
    group i takes part. ``rounding_key`` is that of stochastic rounding for the 16-bit formats (csrc/rounding.h), None
    for rounding to nearest.
    """

    def __init__(
        self, param_groups: Iterable[dict[str, Any]], rounding_key: int | None = None, maximize: bool = False
    ) -> None:
        self.rounding_key = rounding_key
        self.values = array("d")
        self.perturb: list[bool] = []
        for group in param_groups:
            rho, eta, adaptive, perturb = group["rho"], group["eta"], group["adaptive"], group["perturb"]
            usual = type(rho) is type(eta) is float and type(adaptive) is type(perturb) is bool
            if not (usual and 0.0 <= rho < math.inf and 0.0 <= eta < math.inf):  # NaN too
                make_plain(group)
            self.values.extend((float(-rho if group.get("maximize", maximize) else rho), float(eta), float(adaptive)))
            self.perturb.append(bool(perturb))
        self.address = self.values.buffer_info()[0]
        self.wanted = None if all(self.perturb) else bytes(self.perturb)
        """One byte per group, for :class:`~sam_fast.backends.columns.PythonGather`; None where all take part."""

    def of(self, group: int) -> tuple[float, float, bool]:
        """``(rho, eta, adaptive)`` of one group."""
        rho, eta, adaptive = self.values[3 * group : 3 * group + 3]
        return rho, eta, bool(adaptive)


@dataclass
class StepOptions:
    """The base optimizer's options, for a fused second step.

    Args:
        rule: how the base optimizer steps.
        values: a float64 table with ``rule.options`` for each group, NaN for groups without a tensor in the bucket.
        masks: for each group a bit for each of ``rule.all_names`` that its parameters have.
        learning_rates: for each group its learning rate as a tensor (one element, float32 or float64) on the bucket's
            device, which a kernel reads there, or None where ``values`` has it. Empty means None everywhere.
        rounding_key: as in :class:`GroupOptions`, for the new weights.
        given: the values that all this was made from, to compare with; empty if they may change in place.
    """

    rule: Rule
    values: array[float]
    masks: array[int]
    learning_rates: list[Tensor | None] = field(default_factory=list)
    rounding_key: int | None = None
    given: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def num_groups(self) -> int:
        return len(self.masks)

    def of(self, group: int) -> dict[str, float]:
        """The options of one group by name."""
        names = self.rule.options
        return dict(zip(names, self.values[len(names) * group : len(names) * (group + 1)], strict=True))


class Bucket(ABC):
    """Tensors of one device and dtype, the storage for their backup, and the operations; a subclass for each backend.

    Every operation works on the whole bucket, and does not wait for a device.

    Args:
        tensors: strided tensors of one device and dtype.
        groups: for each the index of its parameter group; ascending.
        params: for each the parameters that it stands for, whose version counters change with it: the DTensor that it
            is the local tensor of, or all parameters in a flat buffer. By default the tensor itself.
        backup: another bucket with the same elements in the same slots, whose backup is this one's too.
        shared: tensors may share memory with each other: they must be moved one after the other.
        gradient_of: returns what this process holds of a DTensor's gradient.
    """

    backend: ClassVar[str]
    """Name of the backend."""

    steps: ClassVar[frozenset[str]]
    """Names of the rules whose step is fused."""

    decides_on_device: ClassVar[bool] = False
    """Whether a fused step takes a ``found_inf`` that is not known on the host."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        groups: Sequence[int],
        params: Sequence[list[Tensor]] | None = None,
        backup: Bucket | None = None,
        shared: bool = False,
        gradient_of: GradientOf = grad_of,
    ) -> None:
        self.tensors = list(tensors)
        self.groups = list(groups)
        self.device = tensors[0].device
        self.dtype = tensors[0].dtype
        self.slots, self.numel = slots_of(self.tensors)
        # As they are now: a tensor that changes later must not change what its backup looks like.
        self._layouts = [dense_layout(tensor) for tensor in self.tensors]
        self.params = [[tensor] for tensor in self.tensors] if params is None else list(params)
        self.all_params = [p for of_tensor in self.params for p in of_tensor]
        pairs = zip(self.tensors, self.params, strict=True)
        self.sources = [of[0] if is_wrapper(type(of[0])) else tensor for tensor, of in pairs]
        """The tensors whose ``.grad`` is read, and which are the keys of the base optimizer's state."""
        self.has_wrappers = any(is_wrapper(type(source)) for source in self.sources)
        self.empty = [index for index, tensor in enumerate(self.tensors) if tensor.numel() == 0]
        self.shared = shared
        self.moved = True
        """Whether a tensor was seen in other memory than before, since this was last set to False."""
        self.step_options: StepOptions | None = None
        """Those of the last fused step."""
        self._recorded: bool | None = None  # whether what is saved was only recorded in a graph, see devices.never_ran
        self._backup = backup
        self._gradient_of = gradient_of

    # ---- Layout ------------------------------------------------------------------------------------------------------

    @cached_property
    def chunks(self) -> Tensor:
        """int64 tensor ``[num_chunks, 5]`` on the CPU: ``struct Chunk`` in csrc/table.h. Slots ascend.

        Tensor, group, first element in the tensor, count, first element in the flat index space.
        """
        entries = []
        for index, (tensor, group, slot) in enumerate(zip(self.tensors, self.groups, self.slots, strict=True)):
            numel = tensor.numel()
            for begin in range(0, numel, CHUNK):
                entries.append((index, group, begin, min(CHUNK, numel - begin), slot + begin))
        return allocated(torch.tensor(entries, dtype=torch.int64, device="cpu").reshape(-1, 5))

    @cached_property
    def tensor_table(self) -> Tensor:
        """int64 tensor ``[num_tensors, 3]`` on the CPU: ``struct TensorInfo`` in csrc/table.h.

        Group, number of elements, first element in the flat index space.
        """
        sizes = (tensor.numel() for tensor in self.tensors)
        entries = list(zip(self.groups, sizes, self.slots, strict=True))
        return allocated(torch.tensor(entries, dtype=torch.int64, device="cpu").reshape(-1, 3))

    @cached_property
    def backup(self) -> Tensor:
        """The backup: ``numel`` elements, allocated at first use and kept."""
        return self._allocate_backup()

    def _allocate_backup(self) -> Tensor:
        if self._backup is not None:
            return self._backup.backup
        with torch.inference_mode(False):  # first used in inference mode, it must still be writable outside
            return allocated(torch.empty(self.numel, dtype=self.dtype, device=self.device))

    @cached_property
    def backups(self) -> list[Tensor]:
        """The backup as a tensor for each of the bucket's, with its shape and, if it is dense, in its memory order."""
        return views_of(self.backup, self._layouts, self.slots)

    def by_parameter(self) -> Bucket:
        """A bucket whose tensors are the parameters that this one's tensors stand for, with this one's backup."""
        groups = [group for group, params in zip(self.groups, self.params, strict=True) for _ in params]
        return type(self)(self.all_params, groups, backup=self)

    # ---- First step --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_partials(self) -> int:
        """How many float64 partial sums :meth:`grad_norm` writes."""

    @abstractmethod
    def collect(self, options: GroupOptions, along: list[Tensor | None] | None = None) -> bool:
        """Look up where the tensors and the direction are now. False if a tensor is not what the bucket was built for.

        Tensors of groups with ``perturb=False``, and those without a direction, take no part until the next call.

        Args:
            options: SAM's options of all groups.
            along: the direction, for each tensor one of its shape or None; by default the gradients.

        Raises:
            ParameterError: a direction is sparse or has another shape than its tensor, or its tensor is in float8.
        """

    @abstractmethod
    def grad_norm(self, options: GroupOptions, partials: Tensor) -> None:
        """``partials`` (float64, ``num_partials`` elements) = partial sums of ``||T g||^2``.

        g is the direction; T = 1, or ``|w| + eta`` in adaptive groups.
        """

    @abstractmethod
    def perturb(self, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> None:
        """Back the tensors up and move them: ``w <- w + rho T^2 g / (n + eps)`` with ``n = sqrt(sum(partials))``.

        n goes into ``norm`` (0-d float64). If it is not finite the tensors are backed up and not moved.
        """

    # ---- Backup ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def saved(self) -> list[int] | None:
        """The tensors with a backup that :meth:`restore` has not yet written back. None means all."""

    def is_backed_up(self) -> bool:
        """Whether the backup that :meth:`saved` tells of was written, and not only noted. May wait for the device."""
        return True

    def saved_params(self) -> list[Tensor]:
        """The parameters of the tensors that are saved."""
        saved = self.saved()
        return self.all_params if saved is None else [p for index in saved for p in self.params[index]]

    @abstractmethod
    def save(self) -> bool:
        """Back all tensors up without moving them. False if one is no longer what the bucket was built for."""

    @abstractmethod
    def restore(self, release: bool = True) -> None:
        """Write the backup of the saved tensors back, bit for bit, wherever they are now.

        With ``release`` nothing is saved afterwards.

        Raises:
            ParameterError: a tensor's shape is no longer that of its backup; all others have been restored.
        """

    @abstractmethod
    def release(self) -> None:
        """Note that nothing is saved any more."""

    # ---- Second step -------------------------------------------------------------------------------------------------

    @abstractmethod
    def share_saved(self, source: Bucket) -> None:
        """Take over which tensors are saved from ``source``. This bucket is ``source.by_parameter()``, after
        :meth:`prepare_step`.
        """

    @abstractmethod
    def prepare_step(self, state: Any, options: StepOptions) -> None:
        """Look up where tensors, gradients and the base optimizer's state are now, for a fused second step.

        Args:
            state: that of the base optimizer: ``state[param][name]``.
            options: its options.

        Raises:
            NotFused: a tensor, a gradient or a state is not laid out as the bucket's tensor was.
            MissingState: a state that ``options.masks`` asks for, of a tensor that has a gradient, is not there yet.
        """

    device_counters: bool
    """After :meth:`prepare_step`: whether step counters are on the bucket's device."""

    host_counters: bool
    """After :meth:`prepare_step`: whether there are step counters on the host."""

    @abstractmethod
    def with_gradient(self) -> list[int] | None:
        """After :meth:`prepare_step`: the tensors that have a gradient. None means all."""

    @abstractmethod
    def restore_and_step(self, options: StepOptions, scaling: Scaling) -> None:
        """Put the saved tensors back and step as the base optimizer does; after :meth:`prepare_step`.

        Tensors without a gradient are only put back. Afterwards nothing is saved. Gradients are divided by
        ``scaling.grad_scale``, which is on the bucket's device. If ``scaling.found_inf`` (also there) is not 0, all
        tensors are only put back and the state stays as it was. If there are step counters, a ``found_inf`` needs
        ``device_counters``: a counter on the host has to know beforehand whether there is a step.
        """

    def written_params(self) -> list[Tensor]:
        """After :meth:`prepare_step`: the parameters that the step writes: those that are saved or have a gradient."""
        saved, stepped = self.saved(), self.with_gradient()
        if saved is None or stepped is None:
            return self.all_params
        return [p for index in sorted({*saved, *stepped}) for p in self.params[index]]

    def gradient_of(self, index: int) -> Tensor | None:
        """The gradient of one tensor; of a DTensor, what this process holds of it."""
        return self._gradient_of(self.sources[index])


def step_gradient(bucket: Bucket, index: int) -> Tensor:
    """The gradient of one tensor for a fused second step. Raises NotFused if only the base optimizer can use it."""
    source = bucket.sources[index]
    grad = source.grad
    if grad is not None and is_wrapper(type(source)):
        if getattr(grad, "placements", None) != source.placements:  # type: ignore[attr-defined]
            # Moving it there takes collectives. All processes come to the same answer.
            raise NotFused("a DTensor's gradient is not placed as the parameter is")
        grad = bucket.gradient_of(index)
    if grad is None or not is_plain(grad):
        raise NotFused("a gradient is sparse or has no memory of its own")
    if bucket.dtype == torch.float16 != grad.dtype:
        raise NotFused("float16 would not hold a gradient of another dtype, nor the state made of it")
    return grad


NO_LONGER_LAID_OUT = "a parameter is no longer laid out as it was in first_step"
"""Why a bucket cannot take a fused second step."""


class Backend(ABC):
    """One way to run the operations: where it can be used, what it takes, and its kind of bucket."""

    name: ClassVar[str]
    bucket: ClassVar[type[Bucket]]

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot be used at all here, or None."""

    def unusable_on(self, device: torch.device) -> str | None:
        """Why this backend cannot be used on this device, although it is for devices of this kind, or None."""
        return None

    def build_info(self) -> dict[str, str]:
        """How this backend's native module was built; empty if it has none."""
        return {}

    @abstractmethod
    def rejects(self, tensor: Tensor, arithmetic: bool = True) -> str | None:
        """Why this backend cannot take this tensor, or None, on a device that it can be used on.

        Without ``arithmetic`` the tensor is only to be saved and restored, and may have any dtype.
        """


class ParameterError(RuntimeError):
    """Something is wrong with one parameter.

    Args:
        param: the parameter.
        problem: continues a sentence that begins with its name.
    """

    def __init__(self, param: Tensor, problem: str) -> None:
        super().__init__(f"a parameter of shape {tuple(param.shape)} {problem}")
        self.param = param
        self.problem = problem


def shape_changed(param: Tensor, before: Tensor, now: Tensor) -> ParameterError:
    """The error for a parameter that cannot be restored."""
    problem = f"cannot be restored: its shape changed from {tuple(before.shape)} to {tuple(now.shape)} while perturbed"
    return ParameterError(param, problem)


def check_direction(direction: Tensor, tensor: Tensor, param: Tensor) -> None:
    """Raise ParameterError if the direction is sparse or of another shape (``grad.data = ...`` allows that)."""
    if direction.layout != torch.strided:
        raise ParameterError(
            param,
            f"has a sparse gradient (layout {direction.layout}), which SAM does not support: build the layer with "
            "sparse=False, or put its parameters in a group with perturb=False and use a base optimizer that supports "
            "sparse gradients",
        )
    if direction.shape != tensor.shape:
        raise ParameterError(
            param, f"of shape {tuple(tensor.shape)} has a gradient of another shape, {tuple(direction.shape)}"
        )
