"""Parameters spread over processes: DTensor, which FSDP2's ``fully_shard`` and tensor parallelism are made of.

The kernels work on the local tensors: a row of a bucket is a view of what this process holds of a parameter. Only the norm needs the other
processes. Parameters that are sharded over the same process groups share buckets, so that their sum of squares is one number, which is
all-reduced over these groups; replicas hold the same numbers, and are not counted. Slots of replicas agree on all ranks for the same reason.

Nothing here imports ``torch.distributed.tensor``: without DTensors in the program this module costs a dictionary lookup when buckets are built.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .backends import GroupOptions
    from .bucket import Bucket
    from .norm import NormSum

ProcessGroups = tuple[Any, ...]
"""The process groups over which a sum of squares must be all-reduced, one after the other. Empty for what every process holds."""


class LocalPart:
    """What this process holds of one DTensor parameter.

    Args:
        param: a parameter that is a DTensor.
        group: the index of its parameter group.
        position: its place in the list of all parameters, for error messages.
    """

    def __init__(self, param: Any, group: int, position: int) -> None:
        self.param = param
        self.group = group
        self.position = position
        self.local: Tensor = param._local_tensor
        # A view, so that its `.grad` is nobody else's. It shares the local tensor's memory and version counter.
        self.row = _arrived(self.local).detach()
        self.process_groups = _sharding_groups(param, position)
        # With FSDP2's CPUOffloadPolicy the numbers are on the host and the process groups on the GPU.
        self.reduces_on: str = param.device_mesh.device_type

    def attach(self, own_gradient: bool) -> None:
        """Make the local part of the gradient the row's gradient."""
        grad = self.param.grad
        self.row.grad = None if grad is None else _arrived(self._placed(grad, own_gradient)).detach()

    def _placed(self, grad: Any, own_gradient: bool) -> Tensor:
        """The local tensor of the gradient, laid out as the parameter is."""
        if grad.placements == self.param.placements:
            local: Tensor = grad._local_tensor
            return local
        if own_gradient:
            for of_grad, of_param in zip(grad.placements, self.param.placements, strict=True):
                if of_grad != of_param and not (of_grad.is_partial() and of_param.is_replicate()):
                    raise RuntimeError(
                        f"first_pass(model, sync=False): the gradient of parameter {self.position} is placed as {grad.placements}, the parameter as "
                        f"{self.param.placements}; no process has a gradient of its own of parameters that are sharded. Use sync=True"
                    )
            local = grad._local_tensor
            return local
        # Partial sums, for instance: torch's optimizers have them added up as well.
        return grad.redistribute(placements=self.param.placements)._local_tensor  # type: ignore[no-any-return]


class Sharding:
    """The DTensors among an optimizer's parameters.

    Args:
        params: all parameters.
        groups: for each the index of its parameter group.

    Raises:
        ValueError: a parameter's placement is Partial, or it belongs to a torch.distributed.fsdp.FullyShardedDataParallel.
    """

    def __init__(self, params: Sequence[Tensor], groups: Sequence[int]) -> None:
        dtensor = _dtensor_class()
        self.parts = {id(p): LocalPart(p, group, i) for i, (p, group) in enumerate(zip(params, groups, strict=True)) if isinstance(p, dtensor)}

    def row(self, param: Tensor) -> Tensor:
        """What the kernels see of a parameter."""
        part = self.parts.get(id(param))
        return param if part is None else part.row

    def versioned(self, param: Tensor) -> list[Tensor]:
        """The tensors whose version counters say that a parameter was written: a DTensor has its own, and its local tensor another."""
        part = self.parts.get(id(param))
        return [param] if part is None else [param, part.row]

    def process_groups(self, param: Tensor) -> ProcessGroups:
        part = self.parts.get(id(param))
        return () if part is None else part.process_groups

    def attach_grads(self, options: GroupOptions, own_gradient: bool) -> bool:
        """Give every row its gradient. False if a parameter was given another local tensor; then nothing has been done.

        Args:
            options: those of all groups; only what is perturbed needs its gradient.
            own_gradient: each process climbs along the gradient it has: partial sums are not added up.
        """
        if any(part.param._local_tensor is not part.local for part in self.parts.values()):
            return False
        with torch.no_grad():
            for part in self.parts.values():
                if options.perturb[part.group]:
                    part.attach(own_gradient)
        return True

    def attach_step_grads(self) -> bool:
        """Give every row its gradient for a fused second step.

        False if one is not placed as its parameter is: bringing it there takes collectives, and is better left to the base optimizer. All
        processes give the same answer.
        """
        for part in self.parts.values():
            grad = part.param.grad
            if part.param._local_tensor is not part.local or (grad is not None and grad.placements != part.param.placements):
                return False
        with torch.no_grad():
            for part in self.parts.values():
                part.attach(own_gradient=False)
        return True

    def detach_grads(self) -> None:
        """Let go of the gradients, whose memory ``zero_grad`` is to free."""
        for part in self.parts.values():
            part.row.grad = None

    def combine(self, partials: Iterable[tuple[Bucket, Tensor, NormSum]]) -> None:
        """Add the buckets' partial sums up, over all processes that have a part of them: one number per device, the same on all of them.

        Every process does the same collectives in the same order: what it has no elements or no gradients of is zero.
        """
        totals: dict[ProcessGroups, Tensor] = {}
        homes: dict[ProcessGroups, NormSum] = {}
        for bucket, own, sums in partials:
            part = self.parts.get(id(bucket.params[0][0]))
            total = own.sum()
            if part is None or not part.process_groups:
                sums.partials[0] += total
                continue
            total = total.to(part.reduces_on)
            key = part.process_groups
            totals[key] = totals[key] + total if key in totals else total
            homes.setdefault(key, sums)
        for process_groups, total in totals.items():  # in the order of the parameters, which is the same everywhere
            for process_group in process_groups:
                torch.distributed.all_reduce(total, group=process_group)
            partials_there = homes[process_groups].partials
            partials_there[0] += total.to(partials_there.device)

    def write_back(self, touched: set[int]) -> list[str]:
        """Bring restored weights to parameters that were given another local tensor since (``touched``: ids of those that had been moved).

        Returns a description of each parameter whose local shape has changed, which cannot be restored.
        """
        lost = []
        for part in self.parts.values():
            local = part.param._local_tensor
            if local is part.local or id(part.param) not in touched:
                continue
            if local.shape == part.row.shape:
                with torch.no_grad():
                    local.detach().copy_(part.row)
            else:
                lost.append(f"{tuple(part.row.shape)} -> {tuple(local.shape)}")
        return lost


def sharding_of(params: Sequence[Tensor], groups: Sequence[int]) -> Sharding | None:
    """The DTensors among the parameters, or None if there are none."""
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(
            "SAM does not support torch.distributed.fsdp.FullyShardedDataParallel, whose parameters do not show how they are sharded: use fully_shard"
        )
    dtensor = _dtensor_class()
    if dtensor is None or not any(isinstance(p, dtensor) for p in params):
        return None
    return Sharding(params, groups)


def is_dtensor(value: Any) -> bool:
    """Whether a tensor is a DTensor."""
    dtensor = _dtensor_class()
    return dtensor is not None and isinstance(value, dtensor)


def local_tensor(value: Any) -> Any:
    """What this process holds of a DTensor; anything else itself."""
    local = getattr(value, "_local_tensor", None)
    return value if local is None else _arrived(local)


def _dtensor_class() -> Any:
    """torch's DTensor if the program has imported it; otherwise nothing is one."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def _sharding_groups(param: Any, position: int) -> ProcessGroups:
    """The process groups over which a DTensor is sharded, one for each dimension of its mesh; that of all processes where it is all of them."""
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(f"parameter {position} is placed as {param.placements}: partial sums are no parameter, use Shard or Replicate")
    mesh = param.device_mesh
    sharded = [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate() and mesh.size(dim) > 1]
    if len(sharded) > 1 and math.prod(mesh.size(dim) for dim in sharded) == torch.distributed.get_world_size():
        return (torch.distributed.group.WORLD,)  # one all-reduce in place of one for each dimension
    return tuple(mesh.get_group(dim) for dim in sharded)


def _arrived(tensor: Tensor) -> Tensor:
    """The tensor itself where it is what an asynchronous collective will have written."""
    wait = getattr(tensor, "trigger_wait", None)
    return tensor if wait is None else wait()


# ---- FSDP2's modules ---------------------------------------------------------------------------------------------------------------------


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to it."""
    fsdp_module = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return fsdp_module is not None and isinstance(module, fsdp_module)


def forget_gathered_weights(model: nn.Module) -> None:
    """Have FSDP2 gather the weights anew. After ``set_reshard_after_backward(False)`` it keeps those of the pass before the climb."""
    for module in model.modules():
        if is_fsdp_module(module):
            module.reshard()  # type: ignore[operator]


def give_up_pass(params: Iterable[Tensor]) -> None:
    """After a pass that was given up: FSDP2 lets go of the weights it has gathered, w + e, and of the rest of that pass.

    Torch's own ``reset_iter_state`` (PyTorch 2.13) keeps gradients that were not reduced yet, which the next backward
    pass would add to.

    Args:
        params: the parameters whose pass it was. Whole models are reset, wherever in them these are.
    """
    ids = {id(p) for p in params}
    try:
        for states in _fsdp_models():
            groups = [group for state in states for group in _param_groups(state)]
            if any(id(p.sharded_param) in ids for group in groups for p in group.fsdp_params):
                _drop_gathered(groups)
                with suppress(RuntimeError):  # a process group that has failed
                    _reset_iter_state(states, groups)
    except (ImportError, AttributeError, StopIteration) as error:
        warnings.warn(
            f"the FSDP2 of PyTorch {torch.__version__} is not as it was in the versions that this was written for ({error!r}). "
            "The parameters are restored, but the model may still hold weights that it has gathered, and gradients, of the "
            "pass that was given up: build it anew",
            RuntimeWarning,
            stacklevel=2,
        )


def _fsdp_models() -> list[Any]:
    """For each model that FSDP2 has run the states of its modules.

    Torch has a list of all modules; a parameter does not know the one that it belongs to.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed._composable_state import _module_state_mapping

    modules: list[Any] = [module for module in list(_module_state_mapping) if is_fsdp_module(module)]
    contexts = {id(context): context for context in (module._get_fsdp_state()._state_ctx for module in modules)}
    return [context.all_states for context in contexts.values() if context.all_states]


def _param_groups(state: Any) -> Any:
    """Parameters that FSDP2 gathers together; one group per module before PyTorch 2.12."""
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _drop_gathered(groups: Sequence[Any]) -> None:
    """Have the next pass gather the weights, and begin with no gradients."""
    for group in groups:
        # Stopped in a forward pass, reshard() would keep what reshard_after_forward=False keeps, as the root does.
        group._training_state = group._training_state.IDLE
        group.reshard()
        group._partial_reduce_output = None
        for param in group.fsdp_params:
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None


def _reset_iter_state(states: Sequence[Any], groups: Sequence[Any]) -> None:
    """FSDP2's ``reset_iter_state`` for one model, also where torch has none: before PyTorch 2.13."""
    root = next(state for state in states if state._is_root)
    if hasattr(root, "_reset_iter_state"):
        root._reset_iter_state()
        return
    for state in states:
        state._training_state = state._training_state.IDLE
        state._modules_to_run_forward.clear()
    for group in groups:
        group.finalize_backward()  # waits for what is under way
    comm, context = root._comm_ctx, root._state_ctx
    if comm.all_gather_state is not None:
        if comm.all_gather_state.event is not None:
            root._device_handle.current_stream().wait_event(comm.all_gather_state.event)
        comm.all_gather_state = None
    comm.post_forward_order.clear()
    context.iter_forward_root = None
    context.post_backward_final_callback_queued = False


@contextmanager
def own_gradients(module: nn.Module) -> Iterator[None]:
    """Run one FSDP2 module without adding its gradients up over replicas: with HSDP each replica of the model has a gradient of its own.

    Within a replica gradients are reduced and scattered as always, since no process has room for all of them.

    Raises:
        ValueError: there are no replicas: the parameters are sharded over all processes.
        RuntimeError: torch's FSDP2 is not as it was in the versions that this was written for.
    """
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo

        param_groups = _param_groups(module._get_fsdp_state())  # type: ignore[operator]
        infos = [param_group.mesh_info for param_group in param_groups]
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"first_pass(model, sync=False) does not know the FSDP2 of PyTorch {torch.__version__} ({error}): use sync=True") from None
    for info in infos:
        if not isinstance(info, HSDPMeshInfo):
            raise ValueError(
                "first_pass(model, sync=False) needs a gradient of its own in each replica of the model, and fully_shard on this mesh makes "
                "only one of all processes together: use sync=True, or a 2-D mesh (replicate, shard)"
            )
    # set_requires_all_reduce(False) would keep the gradients in a buffer of FSDP's. A mesh without replicas puts them where they belong.
    try:
        for param_group, info in zip(param_groups, infos, strict=True):
            param_group.mesh_info = FSDPMeshInfo(info.mesh, info.shard_mesh_dim)
            if hasattr(info, "reduce_scatter_process_group"):  # since PyTorch 2.13
                param_group.mesh_info.reduce_scatter_process_group = info.reduce_scatter_process_group
        yield
    finally:
        for param_group, info in zip(param_groups, infos, strict=True):
            param_group.mesh_info = info
