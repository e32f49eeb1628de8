"""FSDP2's modules (``fully_shard``): dropping what they keep of a pass, and gradients that replicas do not share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to it."""
    return isinstance(module, getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ()))


def has_fsdp1(model: nn.Module) -> bool:
    """Whether a FullyShardedDataParallel, which is FSDP1's, is in a model."""
    fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    return any(isinstance(module, fsdp1) for module in model.modules())


def forget_gathered_weights(model: nn.Module) -> None:
    """Make FSDP2 gather the weights anew, and show the sharded ones as the model's parameters.

    After a forward pass without a backward pass its root keeps what it has gathered. With
    ``set_reshard_after_backward(False)`` all modules keep the weights from before the perturbation.
    """
    for module in model.modules():
        if is_fsdp_module(module):
            module.reshard()  # type: ignore[operator]


def give_up_pass(params: Iterable[Tensor]) -> None:
    """After a pass that was given up, make FSDP2 drop the weights that it has gathered, w + e, and all else that it
    keeps of the pass.

    Torch's own ``reset_iter_state`` (PyTorch 2.13) keeps gradients that were not reduced yet, which the next backward
    pass would add to.

    Args:
        params: the parameters of that pass. Every model that contains one of them is reset as a whole.
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
            f"the FSDP2 of PyTorch {torch.__version__} differs from the versions that sam_fast was written for "
            f"({error!r}). The parameters are restored, but the model may still hold gathered weights and gradients of "
            "the pass that was given up: build it anew",
            RuntimeWarning,
            stacklevel=2,
        )


def _fsdp_models() -> list[Any]:
    """For each model that FSDP2 has run, the states of its modules.

    They are found in torch's list of all modules: a parameter does not know its module.
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
        # In the middle of a forward pass reshard() would keep what reshard_after_forward=False keeps, as the root does.
        group._training_state = group._training_state.IDLE
        group.reshard()
        group._partial_reduce_output = None
        for param in group.fsdp_params:
            if "unsharded_accumulated_grad" in vars(param):  # PyTorch 2.15 keeps these in the parameter as well
                param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None


def _reset_iter_state(states: Sequence[Any], groups: Sequence[Any]) -> None:
    """FSDP2's ``reset_iter_state`` for one model, or the same by hand before PyTorch 2.13, which has none."""
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
    """Run one FSDP2 module without adding its gradients up over replicas: with HSDP each replica of the model has a
    gradient of its own.

    Within a replica gradients are reduced and scattered as always, since no process has room for all of them.

    Raises:
        ValueError: there are no replicas: the parameters are sharded over all processes.
        RuntimeError: torch's FSDP2 differs from the versions that this was written for.
    """
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo

        param_groups = _param_groups(module._get_fsdp_state())  # type: ignore[operator]
        infos = [param_group.mesh_info for param_group in param_groups]
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"first_pass(model, sync=False) does not know the FSDP2 of PyTorch {torch.__version__} ({error}): use "
            "sync=True"
        ) from None
    for info in infos:
        if not isinstance(info, HSDPMeshInfo):
            raise ValueError(
                "first_pass(model, sync=False) needs a gradient of its own in each replica of the model, but with "
                "fully_shard on this mesh all processes together have only one: use sync=True, or a 2-D mesh "
                "(replicate, shard)"
            )
    # set_requires_all_reduce(False) would keep the gradients in a buffer of FSDP's. A mesh without replicas puts them
    # where they belong.
    without_replicas = [FSDPMeshInfo(info.mesh, info.shard_mesh_dim) for info in infos]
    swapped = list(zip(param_groups, infos, without_replicas, strict=True))
    try:
        for param_group, info, one_replica in swapped:
            if hasattr(info, "reduce_scatter_process_group"):  # since PyTorch 2.13
                one_replica.reduce_scatter_process_group = info.reduce_scatter_process_group
            _swap_mesh(param_group, info, one_replica)
        yield
    finally:
        for param_group, info, one_replica in swapped:
            _swap_mesh(param_group, one_replica, info)


def _swap_mesh(param_group: Any, old: Any, new: Any) -> None:
    """Replace a parameter group's mesh, in both places. Two different meshes would mean that weights are resharded to
    the other one after the forward pass, which FSDP2 cannot do over tensor parallelism. The root may have no second
    one: FSDP2's first forward pass takes it away.
    """
    for name in ("mesh_info", "post_forward_mesh_info"):
        if getattr(param_group, name) is old:
            setattr(param_group, name, new)
