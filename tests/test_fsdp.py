"""FSDP2 with real processes, against what one process computes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import same_bits
from parallel import (
    RHO,
    SGD,
    TOLERANCE,
    batches,
    collectives,
    each_its_own,
    my_share,
    network,
    one_process,
    share,
    train,
    weights,
)
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import mse_loss

from sam_fast import SAM, sam
from sam_fast.fused_step import fused_step
from sam_fast.reference import ReferenceSAM


def sharded_network(shape: tuple[int, ...], **policy: Any) -> nn.Sequential:
    """The network with every layer sharded by itself, the last one by the root; one number: over all, two: replicas of
    shards.
    """
    model = network()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[2 - len(shape) :])
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [
        {"params": params[:2], "rho": 0.5, "adaptive": True, "eta": 0.01},
        {"params": params[2:], "weight_decay": 0.1},
    ]


BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, SGD),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


def fsdp_trained(
    shape: tuple[int, ...], base: str = "sgd", frozen: tuple[int, ...] = (), grouped: bool = False, sync: bool = True
) -> list[Tensor]:
    model = sharded_network(shape)
    for index in frozen:
        list(model.parameters())[index].requires_grad_(False)
    cls, kwargs = BASES[base]
    optimizer = SAM(two_groups(model) if grouped else model.parameters(), cls, rho=RHO, **kwargs)
    reasons: list[str | None] = []
    with mock.patch.object(sam, "fused_step", lambda *args: reasons.append(fused_step(*args)) or reasons[-1]):
        train(model, optimizer, [my_share(batch) for batch in batches()], sync)
    assert set(reasons) == {None}, "all second steps are in one pass"
    return weights(model)


@pytest.mark.guarantee(id="sharded")
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"frozen": (0, 3)}, {"grouped": True, "base": "adamw"}],
    ids=["sgd", "frozen", "groups-adamw"],
)
@pytest.mark.parametrize("shape", [(4,), (2, 2), (2,)], ids=["over-4", "hsdp", "over-2"])
def test_fsdp_is_one_process_with_the_whole_batch(request, shape, kwargs):
    group = request.getfixturevalue("two" if shape == (2,) else "four")
    cls, options = BASES[kwargs.get("base", "sgd")]
    expected = one_process(
        base=cls, frozen=kwargs.get("frozen", ()), groups=two_groups if "grouped" in kwargs else None, **options
    )
    for found in group.run(fsdp_trained, shape, **kwargs):
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_hsdp_local_is_each_replica_perturbed_along_its_own_gradient(four):
    found = four.run(fsdp_trained, (2, 2), sync=False)
    torch.testing.assert_close(found[0], each_its_own(2), **TOLERANCE)
    assert all(same_bits(of_rank, found[0]) for of_rank in found)


def fsdp_all_reduces(shape: tuple[int, ...], sync: bool) -> tuple[list[str], list[str]]:
    """What the passes of one step communicate, and what its two steps do."""
    model = sharded_network(shape)
    optimizer = SAM(model.parameters(), rho=RHO, **SGD)
    x, y = my_share(batches(1)[0])

    def one_pass() -> None:
        mse_loss(model(x), y).backward()

    with optimizer.first_pass(model, sync=sync):
        passes = collectives(one_pass)
    steps = collectives(lambda: optimizer.first_step(zero_grad=True))
    with optimizer.second_pass(model):
        passes += collectives(one_pass)
    return sorted(passes), steps + collectives(optimizer.second_step)


def plain_all_reduces(shape: tuple[int, ...]) -> list[str]:
    model = sharded_network(shape)
    x, y = my_share(batches(1)[0])
    return sorted(name for _ in range(2) for name in collectives(lambda: mse_loss(model(x), y).backward()))


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=["over-4", "hsdp"])
def test_fsdp_communicates_one_number_more_than_two_passes(four, shape):
    plain = four.run(plain_all_reduces, shape)[0]
    assert len(plain) > 4
    for passes, steps in four.run(fsdp_all_reduces, shape, True):
        assert passes == plain
        assert steps == ["allreduce_"]
    if shape == (2, 2):
        for passes, steps in four.run(fsdp_all_reduces, shape, False):
            assert len(passes) == len(plain) - 3  # the first pass of three layers adds nothing up over replicas
            assert steps == ["allreduce_"]


def local_where_it_cannot_be() -> str:
    model = nn.Sequential(sharded_network((distributed.get_world_size(),)))  # inside a container that is no FSDP module
    optimizer = SAM(model.parameters(), rho=RHO, **SGD)
    text = ""
    try:
        with optimizer.first_pass(model, sync=False):
            raise AssertionError("not reached")
    except ValueError as error:
        text = str(error)
    train(model, optimizer, [my_share(batch) for batch in batches(1)])
    torch.testing.assert_close(weights(model), one_process(1), **TOLERANCE)
    return text


def test_local_without_replicas_is_refused(two):
    assert all("use sync=True, or a 2-D mesh" in text for text in two.run(local_where_it_cannot_be))


def in_bfloat16() -> tuple[list[Tensor], list[Tensor]]:
    """Weights after some steps of FSDP2 in bfloat16, and those of one process that does the same with stateless
    calls.
    """
    model = sharded_network(
        (distributed.get_world_size(),),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    optimizer = SAM(model.parameters(), rho=RHO, lr=0.1)
    train(model, optimizer, [(x, y.to(torch.bfloat16)) for x, y in map(my_share, batches(5))])
    assert all(p.dtype == torch.float64 for p in model.parameters())

    alone = network()
    size = distributed.get_world_size()
    reference = ReferenceSAM(alone.parameters(), rho=RHO, lr=0.1)
    for batch in batches(5):
        for step in (reference.first_step, reference.second_step):
            halves = []
            for index in range(size):
                x, y = (t.to(torch.bfloat16) for t in share(batch, index, size))
                half = network().to(torch.bfloat16)
                half.load_state_dict(alone.state_dict())
                mse_loss(half(x), y).backward()
                halves.append([p.grad.float() for p in half.parameters()])
            for p, *parts in zip(alone.parameters(), *halves, strict=True):
                p.grad = (torch.stack(parts).sum(0) / size).to(torch.float64)
            step(zero_grad=True)
    return weights(model), weights(alone)


def test_fsdp_with_a_mixed_precision_policy(two):
    for found, expected in two.run(in_bfloat16):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # gradients are reduced in float32


def keeps_gathered_weights() -> bool:
    """The first backward pass keeps the gathered weights, as is common with gradient accumulation."""
    model = sharded_network((distributed.get_world_size(),))
    optimizer = SAM(model.parameters(), rho=RHO, **SGD)
    for batch in batches(3):
        x, y = my_share(batch)
        model.set_reshard_after_backward(False)
        mse_loss(model(x), y).backward()
        model.set_reshard_after_backward(True)
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            mse_loss(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
    torch.testing.assert_close(weights(model), one_process(3), **TOLERANCE)
    return True


def test_the_second_pass_gathers_the_weights_anew(two):
    assert two.run(keeps_gathered_weights) == [True, True]


def overflow_and_scaler() -> tuple[list[bool], list[float]]:
    """A GradScaler with FSDP2: steps, and one that overflows in the first pass on rank 1 alone."""
    model = sharded_network((distributed.get_world_size(),))
    optimizer = SAM(model.parameters(), rho=RHO, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    same, scales = [], []
    for overflow in (False, True, False):
        before = weights(model)
        x, y = my_share(batches(1)[0])
        bad = x * torch.inf if overflow and distributed.get_rank() == 1 else x
        scaler.scale(mse_loss(model(bad), y)).backward()
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            scaler.scale(mse_loss(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same.append(same_bits(weights(model), before))
        scales.append(scaler.get_scale())
    return same, scales


def test_fsdp_with_a_gradient_scaler(two):
    assert two.run(overflow_and_scaler) == [([False, True, False], [8.0, 4.0, 4.0])] * 2


def accumulated_in_place() -> list[int]:
    """FSDP2 accumulates in the local tensor of a gradient: a closure must take that for a new gradient."""
    model = sharded_network((distributed.get_world_size(),))
    optimizer = SAM(model.parameters(), rho=RHO, **SGD)
    x, y = my_share(batches(1)[0])
    calls = []
    for i in range(3):
        mse_loss(model(x), y).backward()
        before = len(calls)

        def closure() -> Tensor:
            calls.append(0)
            loss = mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert len(calls) == before + 1, i
        optimizer.zero_grad(set_to_none=False)
    return calls


def test_closures_with_gradients_that_are_zeroed_in_place(two):
    assert two.run(accumulated_in_place) == [[0] * 3] * 2
