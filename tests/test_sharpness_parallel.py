"""sam_fast.sharpness in two processes, against one process with all batches."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from cases import same_bits
from parallel import batches, my_share, network, weights
from processes import Group
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from sam_fast import SAM, TrainStep
from sam_fast.sharpness import hessian_eigenvalue, hessian_trace, loss_along, random_direction, rho_sharpness


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse_loss(model(x), y)


def measured_by_ddp() -> list[Any]:
    model = DistributedDataParallel(network())
    mine = [my_share(batch) for batch in batches(4)]
    mine = mine[: 4 - distributed.get_rank()]  # a batch less
    along, steps = random_direction(model), [0.0, 0.5]
    with pytest.raises(ImportError, match="needs tqdm"), mock.patch.dict("sys.modules", tqdm=None):
        rho_sharpness(model, mean_loss, mine, rho=0.1, progress=True)
    with pytest.raises(ValueError, match="model has a DistributedDataParallel inside"):
        rho_sharpness(nn.Sequential(model), mean_loss, mine, rho=0.1)
    return [
        rho_sharpness(model, mean_loss, mine, rho=0.1, m=4),
        loss_along(model, mean_loss, mine, along, steps),
        hessian_eigenvalue(model, mean_loss, mine, max_iterations=4),
        hessian_trace(model, mean_loss, [] if distributed.get_rank() else mine, samples=4),
    ]


def test_ddp(two: Group) -> None:
    mine, other = two.run(measured_by_ddp)
    assert mine == other
    model, data = network(), batches(4)
    first = [(x[:8], y[:8]) for x, y in data]
    both = [*first, *((x[8:], y[8:]) for x, y in data[:3])]
    sharpness, line, eigenvalue, trace = mine
    close = partial(pytest.approx, rel=1e-9)
    assert vars(sharpness) == close(vars(rho_sharpness(model, mean_loss, both, rho=0.1, m=4)))
    assert line.losses == close(loss_along(model, mean_loss, both, random_direction(model), [0.0, 0.5]).losses)
    assert vars(eigenvalue) == close(vars(hessian_eigenvalue(model, mean_loss, both, max_iterations=4)))
    assert vars(trace) == close(vars(hessian_trace(model, mean_loss, first, samples=4)))


def failing(model: nn.Sequential, x: Tensor, y: Tensor, first: bool) -> Tensor:
    def hook(*_: Any) -> None:
        if torch.is_grad_enabled() == first:
            raise KeyboardInterrupt

    with model[2].register_forward_hook(hook):  # in the middle of the first pass, or of the second
        return mean_loss(model, x, y)


def measured_after_an_evaluation() -> Any:
    """After a forward pass alone FSDP2's root keeps the weights that it has gathered, as parameters of the model."""
    model = network()
    for module in (model[0], model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    mine = [my_share(batch) for batch in batches(3)]
    with torch.no_grad():
        model(mine[0][0])
    return rho_sharpness(model, mean_loss, mine, rho=0.1)


@pytest.mark.guarantee(id="sharpness")
def test_fsdp_after_an_evaluation(two: Group) -> None:
    alone = rho_sharpness(network(), mean_loss, batches(3), rho=0.1)
    for found in two.run(measured_after_an_evaluation):
        assert vars(found) == pytest.approx(vars(alone), rel=1e-9)


def bars_in_half_of_the_processes() -> int:
    """How many progress bars a process shows that measures with the other one of its half alone."""
    half = distributed.get_rank() // 2
    group = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])][half]
    model = DistributedDataParallel(network(), process_group=group)
    with mock.patch("tqdm.tqdm") as bar:
        rho_sharpness(model, mean_loss, batches(1), rho=0.1, progress=True)
    return int(bar.call_count)


def test_one_process_of_each_group_shows_progress(four: Group) -> None:
    pytest.importorskip("tqdm")
    assert four.run(bars_in_half_of_the_processes) == [1, 0, 1, 0]


def trained_with_fsdp(measuring: bool) -> tuple[Any, list[Tensor]]:
    """What is found before the last of three steps, and the weights after it."""
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    mine = [my_share(batch) for batch in batches(3)]
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1)
    step, found = TrainStep(model, optimizer, mean_loss), None
    for batch in mine:
        for first in (True, False) if measuring else ():
            with pytest.raises(KeyboardInterrupt):
                rho_sharpness(model, partial(failing, first=first), mine, rho=0.1)
        if measuring:
            found = rho_sharpness(model, mean_loss, mine, rho=0.1, adaptive=True)
            model.set_reshard_after_backward(False)  # the root keeps the weights it has gathered
            assert found == rho_sharpness(model, mean_loss, mine, rho=0.1, adaptive=True)
            model.set_reshard_after_backward(True)
        step(*batch)
    for call in (hessian_trace, hessian_eigenvalue, partial(loss_along, direction={}, steps=[1.0])):
        with pytest.raises(ValueError, match=r"spread over processes: gather them .*get_model_state_dict"):
            call(model, mean_loss, mine)
    with pytest.raises(ValueError, match="filters have to be whole"):
        random_direction(model)
    with pytest.raises(ValueError, match="m=2 needs gradients of one process"):
        rho_sharpness(model, mean_loss, mine, rho=0.1, m=2)
    return found, weights(model)


@pytest.mark.guarantee(id="sharpness")
def test_fsdp(two: Group) -> None:
    (mine, trained), (other, _) = two.run(trained_with_fsdp, True)
    assert mine == other
    assert same_bits(trained, two.run(trained_with_fsdp, False)[0][1])
    model, data = network(), batches(3)
    step = TrainStep(model, SAM(model.parameters(), rho=0.1, lr=0.1), mean_loss)
    for batch in data[:2]:
        step(*batch)
    alone = rho_sharpness(model, mean_loss, data, rho=0.1, adaptive=True)
    assert vars(mine) == pytest.approx(vars(alone), rel=1e-9)


def measured_with_tensor_parallelism() -> Any:
    mesh = init_device_mesh("cpu", (2,))
    model = parallelize_module(network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return rho_sharpness(model, mean_loss, batches(3), rho=0.1)


def test_tensor_parallelism(two: Group) -> None:
    mine, other = two.run(measured_with_tensor_parallelism)
    assert mine == other
    assert vars(mine) == pytest.approx(vars(rho_sharpness(network(), mean_loss, batches(3), rho=0.1)), rel=1e-9)


def measured_with_tensor_parallelism_in_ddp() -> None:
    """DDP has made plain tensors of the DTensors, which are gone from the model after its first forward pass."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = DistributedDataParallel(parallelize_module(network(), mesh["tensor"], plan), device_mesh=mesh["data"])
    mean_loss(model, *batches(1)[0])
    for call in (partial(rho_sharpness, rho=0.1), hessian_trace, hessian_eigenvalue):
        with pytest.raises(ValueError, match="load the weights into a model without DistributedDataParallel"):
            call(model, mean_loss, batches(1))


def test_tensor_parallelism_in_ddp(four: Group) -> None:
    four.run(measured_with_tensor_parallelism_in_ddp)
