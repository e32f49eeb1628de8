"""Parameters in their own memory: the kernels work on each where it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..backends import Backend, Bucket, choose
from ..backends.bucket import ParameterError
from ..norm import NormSum

ProcessGroups = tuple[Any, ...]
"""The process groups over which a sum of squares must be all-reduced, one after the other. Empty where none must."""

Member = tuple[Tensor, int]
"""A parameter, and the index of its group."""


class InPlace:
    """How parameters become buckets of tensors. Subclasses override what their kind of memory needs."""

    process_wide = False
    """Whether sums of squares are all-reduced over processes, so that each device's is one number."""

    def tensor(self, param: Tensor) -> Tensor:
        """What the kernels see of a parameter."""
        return param

    def process_groups(self, param: Tensor) -> ProcessGroups:
        return ()

    def choose(self, tensor: Tensor, backend: str | None) -> Backend:
        """The backend for a tensor; ``backend`` forces one."""
        return choose(tensor, backend)

    def buckets(self, members: Sequence[tuple[Backend, bool, Sequence[Member]]]) -> list[Bucket]:
        """One bucket for each entry: its backend, whether its parameters share memory, and the parameters."""
        return [self._bucket(backend, shared, of_bucket) for backend, shared, of_bucket in members]

    def _bucket(self, backend: Backend, shared: bool, members: Sequence[Member]) -> Bucket:
        return backend.bucket([p for p, _ in members], [group for _, group in members], shared=shared)

    def held(self) -> set[int]:
        """The ids of the parameters that take part although they may be frozen: others would move if they left."""
        return set()

    def step_buckets(self, buckets: list[Bucket]) -> list[Bucket] | None:
        """For each bucket the one that a fused second step works on, whose tensors are parameters.

        None if parameters are no longer where this storage has put them.
        """
        return buckets

    def collect(self, own_gradient: bool) -> bool:
        """Bring the gradients to where the kernels look. False if a parameter's memory has been replaced.

        Args:
            own_gradient: each process perturbs along the gradient it has: partial sums are not added up.
        """
        return True

    def replaced(self) -> bool:
        """Whether the kernels see other tensors of the parameters than when the buckets were built."""
        return False

    def combine(self, sums: Iterable[tuple[Bucket, Tensor, NormSum]]) -> None:
        """Make each device's sum that over all processes."""

    def release_frozen(self) -> None:
        """Remove the zero gradients that this storage has given to parameters that have been frozen since."""

    def write_back(self, perturbed: Sequence[Tensor]) -> ParameterError | None:
        """Bring restored weights to parameters that were given other memory while they were perturbed.

        Returns the error for one whose shape has changed, which cannot be restored.
        """
        return None

    def written(self, params: list[Tensor]) -> list[Tensor]:
        """The tensors whose version counters must say that kernels have written these parameters."""
        return params

    def zero_grad(self) -> None:
        """Reset the gradients that this storage holds."""

    def give_up_pass(self) -> None:
        """Clean up after a pass that was given up."""
