"""Parameters spread over processes: DTensor, which FSDP2's ``fully_shard`` and tensor parallelism are made of.

The kernels work on the local tensors, what this process holds of each parameter. Only the norm needs the other
processes. Parameters that are sharded over the same process groups share buckets, so that their sum of squares is one
number, which is all-reduced over these groups; replicas hold the same numbers, and are not counted. Slots of replicas
agree on all ranks for the same reason.

Nothing here imports ``torch.distributed.tensor``: without DTensors in the program this module costs a dictionary lookup
when buckets are built.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, Bucket
from ..backends.columns import local_tensor, same_objects
from ..norm import NormSum
from .fsdp import give_up_pass
from .in_place import InPlace, Member, ProcessGroups

_local_of = attrgetter("_local_tensor")


class Sharded(InPlace):
    """Parameters, some of them spread over processes.

    Args:
        params: all parameters.

    Raises:
        ValueError: a parameter's placement is Partial.
    """

    process_wide = True

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._dtensors: list[Any] = [p for p in params if is_dtensor(p)]
        self._all_are_dtensors = len(self._dtensors) == len(params)
        self._locals = [p._local_tensor for p in self._dtensors]
        self._position = {id(p): i for i, p in enumerate(params)}
        spread = [(p, spec_of(p)) for p in params]
        self._specs = {id(p): spec for p, spec in spread if spec is not None}
        self._groups = {key: _sharding_groups(spec, self._position[key]) for key, spec in self._specs.items()}
        self._own_gradient = False

    def tensor(self, param: Tensor) -> Tensor:
        local: Tensor = local_tensor(param)
        return local

    def process_groups(self, param: Tensor) -> ProcessGroups:
        return self._groups.get(id(param), ())

    def _bucket(self, backend: Backend, shared: bool, members: Sequence[Member]) -> Bucket:
        params, groups = [p for p, _ in members], [group for _, group in members]
        tensors = [self.tensor(p) for p in params]
        return backend.bucket(tensors, groups, [[p] for p in params], shared=shared, gradient_of=self._gradient_of)

    def collect(self, own_gradient: bool) -> bool:
        self._own_gradient = own_gradient
        return True

    def replaced(self) -> bool:
        return not same_objects(list(map(_local_of, self._dtensors)), self._locals)

    def _gradient_of(self, param: Any) -> Tensor | None:
        """What this process holds of a gradient, laid out as the parameter is."""
        grad = param.grad
        if grad is None or not is_dtensor(param):
            return grad  # type: ignore[no-any-return]
        with torch.no_grad():
            if grad.placements != param.placements and not self._is_own(param, grad):
                # For instance partial sums, which torch's optimizers also add up.
                grad = grad.redistribute(placements=param.placements)
            local: Tensor = local_tensor(grad)
            return local.detach()

    def _is_own(self, param: Any, grad: Any) -> bool:
        """Whether a gradient is to be taken as it is although it is placed otherwise than its parameter."""
        if not self._own_gradient:
            return False
        for of_grad, of_param in zip(grad.placements, param.placements, strict=True):
            if of_grad != of_param and not (of_grad.is_partial() and of_param.is_replicate()):
                raise RuntimeError(
                    f"first_pass(model, sync=False): the gradient of parameter {self._position[id(param)]} is placed "
                    f"as {grad.placements}, the parameter as {param.placements}; no process has a gradient of its own "
                    "of parameters that are sharded. Use sync=True"
                )
        return True

    def combine(self, sums: Iterable[tuple[Bucket, Tensor, NormSum]]) -> None:
        """Add up the buckets' partial sums, over all processes that have a part of them: one number per device.

        Every process calls the same collectives in the same order. A process without elements or gradients adds zero.
        """
        totals: dict[ProcessGroups, Tensor] = {}
        homes: dict[ProcessGroups, NormSum] = {}
        sums = list(sums)
        for home in {id(home): home for _, _, home in sums}.values():
            home.partials.zero_()
        for bucket, own, home in sums:
            param = bucket.params[0][0]
            total = own.sum()
            key = self.process_groups(param)
            if not key:
                home.total.add_(total)
                continue
            # With FSDP2's CPUOffloadPolicy the numbers are on the host and the process groups on the GPU.
            total = total.to(self._specs[id(param)].mesh.device_type)
            totals[key] = totals[key] + total if key in totals else total
            homes.setdefault(key, home)
        for process_groups, total in totals.items():  # in the order of the parameters, which is the same everywhere
            for process_group in process_groups:
                torch.distributed.all_reduce(total, group=process_group)
            home_total = homes[process_groups].total
            home_total.add_(total.to(home_total.device))

    def written(self, params: list[Tensor]) -> list[Tensor]:
        # A DTensor has a version counter, and its local tensor another.
        dtensors = params if self._all_are_dtensors else filter(is_dtensor, params)
        return [*params, *map(_local_of, dtensors)]

    def give_up_pass(self) -> None:
        give_up_pass(self._dtensors)


def sharded_storage(params: Sequence[Tensor]) -> Sharded | None:
    """The storage of parameters of which some are spread over processes; None if there are none.

    Raises:
        ValueError: a parameter belongs to a torch.distributed.fsdp.FullyShardedDataParallel.
    """
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(
            "SAM does not support torch.distributed.fsdp.FullyShardedDataParallel, whose parameters do not show how "
            "they are sharded: use fully_shard"
        )
    return Sharded(params) if any(spec_of(p) is not None for p in params) else None


def is_dtensor(value: Any) -> bool:
    """Whether a tensor is a DTensor. Nothing is one until the program has imported them."""
    return isinstance(value, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def spec_of(param: Any) -> Any:
    """How a parameter is spread over which mesh (a DTensorSpec), or None.

    DistributedDataParallel around tensor parallelism (``device_mesh=``) makes plain tensors of DTensors, and keeps this
    in an attribute.
    """
    return param._spec if is_dtensor(param) else getattr(param, "_st_info", None)


def _sharding_groups(spec: Any, position: int) -> ProcessGroups:
    """The process groups over which a parameter is sharded: one per dimension of its mesh, or that of all processes."""
    if any(placement.is_partial() for placement in spec.placements):
        raise ValueError(
            f"parameter {position} is placed as {spec.placements}: a parameter cannot be a partial sum, use Shard or "
            "Replicate"
        )
    mesh = spec.mesh
    placements = enumerate(spec.placements)
    over = [dim for dim, placement in placements if not placement.is_replicate() and mesh.size(dim) > 1]
    if len(over) > 1 and math.prod(mesh.size(dim) for dim in over) == torch.distributed.get_world_size():
        return (torch.distributed.group.WORLD,)  # one all-reduce in place of one for each dimension
    return tuple(mesh.get_group(dim) for dim in over)
