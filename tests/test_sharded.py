"""DTensor parameters, with real processes: placements of every kind, FSDP2 and tensor parallelism, against what one
process computes.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch
from cases import buckets_of, same_bits, values
from parallel import (
    RHO,
    SGD,
    TOLERANCE,
    batches,
    collectives,
    each_its_own,
    network,
    one_process,
    share,
    train,
    weights,
)
from plain_sam import PlainSAM
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from sam_fast import SAM, TrainStep
from sam_fast.reference import ReferenceSAM

# ---- Placements ------------------------------------------------------------------------------------------------------

SHAPES = [(5, 3), (8, 4), (2, 6), (1, 9), (0, 4), (130, 129)]
S0, S1, R = Shard(0), Shard(1), Replicate()
PLACEMENTS: dict[str, tuple[tuple[int, ...], list[list[Any]], int]] = {
    "shard-0": ((4,), [[S0]], 1),
    "shard-1": ((4,), [[S1]], 1),
    "replicate": ((4,), [[R]], 0),
    "hsdp": ((2, 2), [[R, S0]], 1),
    "hsdp-turned": ((2, 2), [[S0, R]], 1),
    "shard-0-shard-1": ((2, 2), [[S0, S1]], 1),
    "shard-0-shard-0": ((2, 2), [[S0, S0]], 1),
    "a-dimension-of-one": ((1, 4), [[S0, S1]], 1),
    "all-kinds": ((2, 2), [[S0, S0], [R, S1], [S0, R], [R, R]], 3),
}
"""Shape of the mesh, placements that the parameters take in turn, and how many all-reduces the norm takes."""


def full_params(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in [*SHAPES, *SHAPES]]


def options(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """SAM, ASAM, and a group that does not count; in the first a parameter without a gradient."""
    return [
        {"params": params[:3]},
        {"params": params[3:5], "rho": 0.5, "adaptive": True, "eta": 0.01},
        {"params": params[5:6], "perturb": False},
    ]


def a_step(
    shape: tuple[int, ...], placements: list[list[Any]], dtype: torch.dtype, backend: str | None, world: int = 4
) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", shape)
    full = full_params(dtype)
    params = []
    for i, w in enumerate(full[: len(SHAPES)]):
        p = nn.Parameter(distribute_tensor(w, mesh, placements[i % len(placements)]))
        p.grad = None if i == 1 else distribute_tensor(full[i + len(SHAPES)], mesh, placements[i % len(placements)])
        params.append(p)
    with mock.patch.object(distributed, "get_world_size", return_value=world):
        optimizer = SAM(options(params), rho=RHO, backend=backend, lr=0.1)
    before = [p.to_local().detach().clone() for p in params]
    stale = (params[0] * params[0]).sum()
    started = collectives(optimizer.first_step)
    perturbed = [p.full_tensor().detach().clone() for p in params]
    assert all(tensor.grad is None for bucket in buckets_of(optimizer) for tensor in bucket.tensors), (
        "gradients are kept alive"
    )
    if before[0].numel() > 0:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()
    norm = optimizer.grad_norm
    if distributed.get_rank() == 0:
        optimizer.restore()
    else:
        with suppress(ZeroDivisionError), optimizer.second_pass(nn.Module()):
            raise ZeroDivisionError
    restored = same_bits([p.to_local() for p in params], before)
    started += collectives(optimizer.first_step)
    optimizer.second_step()
    backups = sum(bucket.backup.numel() for bucket in buckets_of(optimizer))
    padding = len(params) * 64 // dtype.itemsize
    assert backups <= sum(w.numel() for w in before) + padding, "a backup of more than the local parts"
    local = {
        i: p.to_local().detach().clone()
        for i, p in enumerate(params)
        if all(placement.is_replicate() for placement in p.placements)
    }
    return {
        "norm": norm,
        "perturbed": perturbed,
        "restored": restored,
        "collectives": started,
        "w": weights_of(params),
        "local": local,
    }


def weights_of(params: list[Any]) -> list[Tensor]:
    return [p.full_tensor().detach().clone() for p in params]


@pytest.mark.guarantee(id="sharded")
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("case", PLACEMENTS)
def test_a_step_is_that_of_whole_tensors(four, case, backend):
    shape, placements, all_reduces = PLACEMENTS[case]
    found = four.run(a_step, shape, placements, torch.float64, backend)
    full = full_params(torch.float64)
    params = [nn.Parameter(w.clone()) for w in full[: len(SHAPES)]]
    for i, p in enumerate(params):
        p.grad = None if i == 1 else full[i + len(SHAPES)].clone()
    oracle = ReferenceSAM(options(params), rho=RHO, lr=0.1)
    oracle.first_step()
    perturbed = values(params)
    oracle.second_step()
    for of_rank in found:
        assert of_rank["restored"]
        # two first_steps, and nothing in what follows them
        assert of_rank["collectives"] == ["allreduce_"] * 2 * all_reduces
        torch.testing.assert_close(of_rank["norm"], oracle.grad_norm, rtol=1e-12, atol=0.0)
        for key, expected in (("perturbed", perturbed), ("w", params)):
            torch.testing.assert_close(of_rank[key], values(expected), rtol=1e-12, atol=1e-13)
        assert torch.equal(of_rank["norm"], found[0]["norm"]), "the norm has other bits on another rank"
        assert same_bits(list(of_rank["local"].values()), list(found[0]["local"].values()))


def test_a_mesh_that_is_not_the_whole_world_takes_an_all_reduce_for_each_dimension(four):
    shape, placements, _ = PLACEMENTS["shard-0-shard-1"]
    found = four.run(a_step, shape, placements, torch.float64, None, world=8)
    expected = four.run(a_step, shape, placements, torch.float64, None)
    assert found[0]["collectives"] == ["allreduce_"] * 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one["norm"], other["norm"], rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_kernels_do_to_a_part_what_they_do_to_the_whole(four, dtype):
    shape, placements, _ = PLACEMENTS["all-kinds"]
    found = four.run(a_step, shape, placements, dtype, None)[0]
    full = full_params(dtype)
    params = [nn.Parameter(w.clone()) for w in full[: len(SHAPES)]]
    for i, p in enumerate(params):
        p.grad = None if i == 1 else full[i + len(SHAPES)].clone()
    optimizer = SAM(options(params), rho=RHO, lr=0.1)
    optimizer.first_step()
    torch.testing.assert_close(found["norm"], optimizer.grad_norm, rtol=1e-14, atol=0.0)
    for a, b in zip(found["perturbed"], params, strict=True):
        # should the last bit of the norm differ
        torch.testing.assert_close(a, b.detach(), rtol=torch.finfo(dtype).eps, atol=0.0)


# ---- Tensor parallelism, and DTensor's own data parallelism ----------------------------------------------------------


def tensor_parallel(data_shape: tuple[int, ...], sync: bool = True) -> list[Tensor]:
    """Two layers split, the third whole on every rank and no DTensor; FSDP2 over the other dimensions of the mesh."""
    names = ("replicate", "shard")[2 - len(data_shape) :]
    mesh = init_device_mesh("cpu", (*data_shape, 2), mesh_dim_names=(*names, "tensor"))
    model = parallelize_module(network(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    data = batches()
    if names:
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh[names])
        data = [share(batch, mesh.get_local_rank(names[0]), data_shape[0]) for batch in data]
    optimizer = SAM(model.parameters(), rho=RHO, foreach=False, **SGD)
    train(model, optimizer, data, sync)
    return weights(model)


@pytest.mark.parametrize("data_shape", [(), (2,), (2, 1)], ids=["tensor", "data-and-tensor", "hsdp-and-tensor"])
def test_tensor_parallel_is_one_process(request, data_shape):
    group = request.getfixturevalue("four" if data_shape else "two")
    for found in group.run(tensor_parallel, data_shape):
        torch.testing.assert_close(found, one_process(), **TOLERANCE)


def test_hsdp_over_tensor_parallelism_with_gradients_of_each_replicas_own(four):
    for found in four.run(tensor_parallel, (2, 1), sync=False):
        torch.testing.assert_close(found, each_its_own(2), **TOLERANCE)


def clipped_mixture() -> list[Tensor]:
    """DTensors and plain parameters, and a base optimizer that steps by itself: gradients are clipped in place."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(network(), init_device_mesh("cpu", (distributed.get_world_size(),)), plan)
    optimizer = SAM(model.parameters(), torch.optim.RMSprop, rho=RHO, lr=0.01, foreach=False)
    step = TrainStep(model, optimizer, lambda model, x, y: mse_loss(model(x), y), clip_grad_norm=0.05)
    for batch in batches(4):
        step(*batch)
    return weights(model)


def test_clipping_of_a_mixture(two):
    model = network()
    alone = PlainSAM(model.parameters(), torch.optim.RMSprop, rho=RHO, lr=0.01)
    for x, y in batches(4):
        for step in (alone.first_step, alone.second_step):
            mse_loss(model(x), y).backward()
            if step == alone.second_step:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            step()
    for found in two.run(clipped_mixture):
        torch.testing.assert_close(found, weights(model), **TOLERANCE)


def tensor_parallel_in_ddp(sync: bool) -> list[Tensor]:
    """DDP over the first dimension makes plain tensors of the DTensors, and keeps how they were placed."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = DistributedDataParallel(parallelize_module(network(), mesh["tensor"], plan), device_mesh=mesh["data"])
    params: list[Any] = list(model.parameters())
    assert not any(isinstance(p, DTensor) for p in params)
    optimizer = SAM(params, rho=RHO, **SGD)
    train(model, optimizer, [share(batch, mesh.get_local_rank("data"), 2) for batch in batches()], sync)
    placed = [p._st_info if hasattr(p, "_st_info") else None for p in params]
    return [
        p.detach() if spec is None else DTensor.from_local(p.detach(), spec.mesh, spec.placements).full_tensor()
        for p, spec in zip(params, placed, strict=True)
    ]


@pytest.mark.guarantee(id="sharded")
@pytest.mark.parametrize("sync", [True, False], ids=["synchronised", "local"])
def test_tensor_parallel_in_ddp(four, sync):
    found = four.run(tensor_parallel_in_ddp, sync)
    for of_rank in found:
        torch.testing.assert_close(of_rank, one_process() if sync else each_its_own(2), **TOLERANCE)
        assert same_bits(of_rank, found[0])


def replicated(sync: bool, to_replicate: bool = True) -> list[Tensor]:
    """Data parallelism by DTensor alone: batches are sharded, so that gradients are partial sums."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = distribute_module(network(), mesh)
    if not to_replicate:
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach().full_tensor(), mesh, [Shard(0)]))
    optimizer = SAM(model.parameters(), rho=RHO, **SGD)
    for batch in batches():
        x, y = (distribute_tensor(t, mesh, [Shard(0)]) for t in batch)

        def one_pass(x: Any = x, y: Any = y) -> None:
            (model(x) - y).square().mean().backward()

        with optimizer.first_pass(model, sync=sync):
            one_pass()
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            one_pass()
        optimizer.second_step(zero_grad=True)
    return weights(model)


def test_partial_gradients_are_added_up(two):
    for found in two.run(replicated, True):
        torch.testing.assert_close(found, one_process(), **TOLERANCE)


def test_partial_gradients_stay_each_processs_own_where_they_are_to(two):
    found = two.run(replicated, False)
    torch.testing.assert_close(found[0], each_its_own(2), **TOLERANCE)
    assert same_bits(found[0], found[1])


# ---- What changes, and what is refused -------------------------------------------------------------------------------


def another_local_tensor() -> bool:
    """A parameter is given other memory between steps, and between the passes."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.arange(12.0).reshape(4, 3), mesh, [S0]))
    optimizer = SAM([p], rho=RHO, lr=0.0)
    before = p.full_tensor().detach().clone()
    for when in ("between-steps", "between-passes"):
        if when == "between-steps":
            p._local_tensor = p._local_tensor.clone()
        p.grad = distribute_tensor(torch.ones(4, 3), mesh, [S0])
        optimizer.first_step()
        moved = p.full_tensor().detach() - before
        torch.testing.assert_close(moved, torch.full((4, 3), RHO / 12**0.5), rtol=1e-5, atol=1e-6)
        if when == "between-passes":
            p._local_tensor = p._local_tensor.clone()
        optimizer.second_step()
        assert torch.equal(p.full_tensor().detach(), before), when
    return True


def refused() -> list[str]:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [S0]))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()]))
    old = FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu"))
    texts = []
    for params, kwargs in ([sharded], {"flatten": True}), ([partial], {}), (old.parameters(), {}):
        try:
            SAM(params, lr=0.1, **kwargs)
        except ValueError as error:
            texts.append(str(error))
    late = network()
    optimizer = SAM(late.parameters(), lr=0.1)  # parameters that get no gradients, once FSDP1 has replaced them
    try:
        TrainStep(FullyShardedDataParallel(late, device_id=torch.device("cpu")), optimizer, lambda model, x: model(x))
    except ValueError as error:
        texts.append(str(error))
    optimizer = SAM([sharded], rho=RHO, lr=0.1)
    with optimizer.first_pass(nn.Module(), sync=False):
        sharded.grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    before = sharded.full_tensor().detach().clone()
    try:
        optimizer.first_step()
    except RuntimeError as error:
        texts.append(str(error))
    assert torch.equal(sharded.full_tensor(), before)
    return texts


def test_another_local_tensor(two):
    assert two.run(another_local_tensor) == [True, True]


def test_what_cannot_be_is_refused(two):
    for flat, partial, old, late, own in two.run(refused):
        assert "flatten=True cannot move DTensor parameters" in flat
        assert "a parameter cannot be a partial sum" in partial
        assert "use fully_shard" in old
        assert "use fully_shard" in late
        assert "no process has a gradient of its own" in own
