"""What a backend is: the operations, over buckets, that the optimizer and the BatchNorm snapshot are made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bucket import is_wrapper
from ..options import check_options

if TYPE_CHECKING:
    from ..amp import Scaling
    from ..bucket import Bucket


class GroupOptions:
    """The options of all parameter groups, read once per step.

    ``values`` is a float64 table with ``rho, eta, adaptive`` for each group, as ``struct Group`` in csrc/table.h; rho is negative in a group
    whose objective is maximized. ``perturb[i]`` says whether group i takes part at all. ``rounding_key`` is that of stochastic rounding for the
    16-bit formats (csrc/rounding.h), None for rounding to nearest.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]], rounding_key: int | None = None) -> None:
        self.rounding_key = rounding_key
        self.values = array("d")
        self.perturb: list[bool] = []
        for group in param_groups:
            rho, eta = float(group["rho"]), float(group["eta"])
            if not (0.0 <= rho < math.inf and 0.0 <= eta < math.inf):  # NaN too
                check_options(group)
            self.values.extend((-rho if group.get("maximize", False) else rho, eta, 1.0 if group["adaptive"] else 0.0))
            self.perturb.append(bool(group["perturb"]))
        self.all_perturb = all(self.perturb)

    def of(self, group: int) -> tuple[float, float, bool]:
        """``(rho, eta, adaptive)`` of one group."""
        rho, eta, adaptive = self.values[3 * group : 3 * group + 3]
        return rho, eta, bool(adaptive)


def shape_changed(lost: list[str]) -> RuntimeError:
    """The error for parameters that cannot be restored; ``lost`` says of each from which shape to which."""
    return RuntimeError(f"the shape of a parameter changed while its weights were perturbed; it cannot be restored ({'; '.join(lost)})")


def rejects_memory(tensor: Tensor) -> str | None:
    """Why the elements of ``tensor`` cannot be read and written at its address, or None."""
    if is_wrapper(type(tensor)):
        return f"a {type(tensor).__name__}, whose elements do not lie in memory of its own"
    if tensor.is_neg() or tensor.is_conj():
        return "a tensor whose sign or conjugation is still to be applied (is_neg() or is_conj(): see resolve_neg, resolve_conj)"
    return None


def signature(tensor: Tensor) -> tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]:
    """What a row must still be when its address is taken. The stride of a dimension that holds at most one element may be anything."""
    empty = tensor.numel() == 0
    strides = tuple(0 if empty or size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.dtype, tensor.device, tensor.shape, strides


def has_memory(tensor: Tensor) -> bool:
    """False if the storage of a strided tensor with elements was resized to nothing: PyTorch's own kernels would then write to address 0."""
    return tensor.numel() == 0 or tensor.data_ptr() != 0


def check_dense_gradient(grad: Tensor, param: Tensor) -> None:
    """Raise RuntimeError if ``grad`` is sparse, or has another shape than ``param`` (autograd refuses that; ``grad.data = ...`` does not)."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"SAM does not support sparse gradients (found layout {grad.layout}): build the layer with sparse=False, "
            "or put its parameters in a group with perturb=False and use a base optimizer that takes them"
        )
    if grad.shape != param.shape:
        raise RuntimeError(f"a gradient of shape {tuple(grad.shape)} does not belong to a parameter of shape {tuple(param.shape)}")


@dataclass
class StateTensors:
    """The base optimizer's options, and its state of a bucket's rows, for a fused second step.

    Args:
        tensors: ``tensors[name][i]`` is the state called ``name`` of row i, in torch.optim's own format, or None where the row takes no step or
            its group's options need none.
        groups: a float64 table, one ``struct SgdGroup`` or ``struct AdamGroup`` (csrc/table.h) for each group.
        learning_rates: for each group its learning rate as a tensor (one element, float32 or float64) on the bucket's device, which a kernel
            reads there, or None where ``groups`` has it. Empty is short for None everywhere.
        device_steps: Adam's step counters are on the bucket's device (``capturable=True`` or ``fused=True``), not on the host.
        rounding_key: as in :class:`GroupOptions`, for the weights.
    """

    tensors: dict[str, list[Tensor | None]]
    groups: array[float]
    learning_rates: list[Tensor | None] = field(default_factory=list)
    device_steps: bool = False
    rounding_key: int | None = None


class Backend(ABC):
    """One way to run the operations. Every operation works on a whole bucket; none allocates after its first use, none waits for a device."""

    name: str

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot be used at all here, or None."""

    def unusable_on(self, device: torch.device) -> str | None:
        """Why this backend cannot be used on this device of a kind that it is for, or None."""
        return None

    def build_info(self) -> dict[str, str]:
        """How this backend's native module was built; empty if it has none."""
        return {}

    @abstractmethod
    def rejects(self, tensor: Tensor, arithmetic: bool = True) -> str | None:
        """Why this backend cannot take this tensor as a row, or None. Without ``arithmetic``: for ``save`` and ``restore`` only, any dtype."""

    @abstractmethod
    def attach(self, bucket: Bucket) -> Any:
        """The table with which this backend finds the bucket's rows; becomes ``bucket.table``."""

    @abstractmethod
    def num_partials(self, bucket: Bucket) -> int:
        """How many float64 partial sums ``grad_norm`` writes for this bucket."""

    @abstractmethod
    def addresses(self, bucket: Bucket) -> bytes:
        """Where the rows were when they were last collected: equal if no row lies elsewhere."""

    @abstractmethod
    def collect(self, bucket: Bucket, options: GroupOptions) -> bool:
        """Look up where the rows and their gradients are now. False if a row is no longer what the bucket was built for.

        Rows of groups with ``perturb=False`` and rows whose ``.grad`` is None take no part until the next call.

        Raises:
            RuntimeError: a gradient is sparse.
        """

    @abstractmethod
    def grad_norm(self, bucket: Bucket, options: GroupOptions, partials: Tensor) -> None:
        """``partials`` (float64, ``num_partials`` elements) = partial sums of ``||T g||^2``; T = 1, or ``|w| + eta`` in adaptive groups."""

    @abstractmethod
    def perturb(self, bucket: Bucket, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> None:
        """Back the rows up and climb: ``w <- w + rho T^2 g / (n + eps)`` with ``n = sqrt(sum(partials))``, which goes into ``norm`` (0-d float64).

        If n is not finite the rows are backed up and not moved. Afterwards ``saved(bucket)`` lists the rows.
        """

    @abstractmethod
    def saved(self, bucket: Bucket) -> list[int] | None:
        """The rows that have a backup which ``restore`` has not yet written back; None is short for all of them."""

    @abstractmethod
    def restore(self, bucket: Bucket, release: bool = True) -> None:
        """Write the backup of the saved rows back, bit for bit, wherever the rows are now. With ``release`` nothing is saved afterwards.

        Raises:
            RuntimeError: a row's shape is no longer that of its backup; all other rows have been restored.
        """

    @abstractmethod
    def save(self, bucket: Bucket) -> bool:
        """Back all rows up without moving them, for a later ``restore``. False if a row is no longer what the bucket was built for."""

    fused_steps: frozenset[str] = frozenset()
    """Which of ``restore_sgd`` and ``restore_adam`` this backend has."""

    steps_empty_rows = False
    """Whether ``restore_adam`` counts the steps of rows without elements too."""

    decides_on_device = False
    """Whether they take a ``found_inf`` that is not known on the host."""

    def share_saved(self, bucket: Bucket, source: Bucket) -> None:
        """Note for each row of ``bucket``, which is ``source.by_parameter()`` and has been collected, whether it is saved in ``source``."""
        raise NotImplementedError(f"the {self.name} backend has no fused second step")

    def release(self, bucket: Bucket) -> None:
        """Note that nothing is saved any more."""
        raise NotImplementedError(f"the {self.name} backend has no fused second step")

    def collect_step(self, bucket: Bucket, state: StateTensors) -> bool:
        """Look up where rows, gradients and state are now, for a fused second step. False if it must be done by the base optimizer: a row or its
        state is not laid out as the bucket's row was."""
        raise NotImplementedError(f"the {self.name} backend has no fused second step")

    def restore_sgd(self, bucket: Bucket, state: StateTensors, scaling: Scaling) -> None:
        """After ``collect_step``: put the saved rows back and step as torch.optim.SGD does. State: ``momentum_buffer``.

        Rows without a gradient are only put back. Afterwards nothing is saved. Gradients are divided by ``scaling.grad_scale``, which is on the
        bucket's device; where ``scaling.found_inf`` (also there) is not 0, all rows are only put back and the state stays as it was.
        """
        raise NotImplementedError(f"the {self.name} backend has no restore_sgd")

    def restore_adam(self, bucket: Bucket, state: StateTensors, scaling: Scaling) -> None:
        """As ``restore_sgd``, for torch.optim.Adam and AdamW. State: ``step``, ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``.

        ``scaling.found_inf`` needs ``state.device_steps``: a counter on the host has to know beforehand whether there is a step.
        """
        raise NotImplementedError(f"the {self.name} backend has no restore_adam")
