"""Schedules, TrainStep and clipping in two processes, under DDP and FSDP2, against one process with the whole batch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import same_bits
from parallel import RHO, SGD, STEPS, TOLERANCE, batches, each_its_own, my_share, network, weights
from plain_sam import PlainSAM
from processes import Group
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from sam_fast import SAM, Schedule, TrainStep

SCHEDULE = Schedule(every=3, start=2)
MAX_NORM = 0.05


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse_loss(model(x), y)


def parallel(kind: str) -> nn.Module:
    model = network()
    if kind != "fsdp":
        return DistributedDataParallel(model, static_graph=kind == "static graph")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(kind: str, ascent: float, clip: float | None, micro_batches: int) -> tuple[list[Tensor], list[bool]]:
    model = parallel(kind)
    optimizer = SAM(model.parameters(), rho=RHO, schedule=SCHEDULE, **SGD)
    options: dict[str, Any] = {"ascent": ascent, "clip_grad_norm": clip, "micro_batches": micro_batches}
    step = TrainStep(model, optimizer, loss_of, **options)
    perturbed = []
    for batch in batches(STEPS):
        perturbed.append(optimizer.will_perturb)
        step(*my_share(batch))
    return weights(model), perturbed


def one_process(processes: int, every: int, clip: float | None) -> list[Tensor]:
    model = network()
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, **SGD)
    for step, (x, y) in enumerate(batches(STEPS)):
        old = [p.detach().clone() for p in params]
        if step >= 2 and (step - 2) % 3 == 0:
            # Every process takes every k-th row of its own share.
            rows = torch.cat([part[::every] for part in torch.arange(len(x)).chunk(processes)])
            grads = torch.autograd.grad(loss_of(model, x[rows], y[rows]), params)
            norm = torch.stack([g.norm() for g in grads]).norm()
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p += RHO * g / norm
        loss_of(model, x, y).backward()
        with torch.no_grad():
            for p, w in zip(params, old, strict=True):
                p.copy_(w)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.guarantee(id="train-step")
@pytest.mark.parametrize("kind", ["ddp", "static graph", "fsdp"])
@pytest.mark.parametrize(("ascent", "clip", "micro_batches"), [(1.0, None, 1), (0.25, None, 2), (0.5, MAX_NORM, 1)])
def test_two_processes_are_one_with_the_whole_batch(
    two: Group, kind: str, ascent: float, clip: float | None, micro_batches: int
) -> None:
    found = two.run(trained, kind, ascent, clip, micro_batches)
    assert all(same_bits(of_rank, found[0][0]) for of_rank, _ in found)
    assert all(perturbed == [SCHEDULE.perturbs(n) for n in range(STEPS)] for _, perturbed in found)
    torch.testing.assert_close(found[0][0], one_process(2, round(1 / ascent), clip), **TOLERANCE)


def trained_on_unequal_shares(ascent: float) -> list[Tensor]:
    model = parallel("fsdp")
    step = TrainStep(model, SAM(model.parameters(), rho=RHO, **SGD), loss_of, ascent=ascent, micro_batches=4)
    for x, y in batches(3):
        mine = slice(0, 9) if distributed.get_rank() == 0 else slice(9, None)
        step(x[mine], y[mine])
    return weights(model)


@pytest.mark.guarantee(id="train-step")
@pytest.mark.parametrize("every", [1, 2])
def test_batches_of_different_sizes_are_cut_into_as_many_parts(two: Group, every: int) -> None:
    # FSDP2 gathers weights in each part: a process with another number of them would wait for ever.
    found = two.run(trained_on_unequal_shares, 1 / every)
    model = network()
    alone = PlainSAM(model.parameters(), rho=RHO, **SGD)
    for x, y in batches(3):
        for rows, step in ((slice(None, None, every), alone.first_step), (slice(None), alone.second_step)):
            for mine in (slice(0, 9), slice(9, None)):
                (loss_of(model, x[mine][rows], y[mine][rows]) / 2).backward()
            step()
    torch.testing.assert_close(found[0], weights(model), **TOLERANCE)


def trained_along_own_gradients(micro_batches: int) -> list[Tensor]:
    model = parallel("ddp")
    step = TrainStep(model, SAM(model.parameters(), rho=RHO, **SGD), loss_of, micro_batches=micro_batches, sync=False)
    for batch in batches(STEPS):
        step(*my_share(batch))
    return weights(model)


@pytest.mark.guarantee(id="ddp")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_without_synchronisation_each_process_perturbs_along_its_own_gradient(two: Group, micro_batches: int) -> None:
    found = two.run(trained_along_own_gradients, micro_batches)
    assert all(same_bits(of_rank, found[0]) for of_rank in found)
    torch.testing.assert_close(found[0], each_its_own(2), **TOLERANCE)


def after_an_epoch_of_unequal_length(counts_set: bool) -> list[Tensor]:
    model = parallel("ddp")
    optimizer = SAM(model.parameters(), rho=RHO, schedule=Schedule(every=2), lr=0.05)
    step = TrainStep(model, optimizer, loss_of)
    with model.join():
        for batch in batches(4 - distributed.get_rank()):
            step(*my_share(batch))
    if counts_set:
        taken = torch.tensor(optimizer.param_groups[0]["sam_step"])
        distributed.all_reduce(taken, distributed.ReduceOp.MAX)
        for group in optimizer.param_groups:
            group["sam_step"] = int(taken)
    for batch in batches(4):
        step(*my_share(batch))
    return weights(model)


def test_a_schedule_after_join_needs_the_same_count_on_all_ranks(two: Group) -> None:
    """As docs/distributed.md says. Without it the first pass of one process meets the only pass of the other."""
    first, second = two.run(after_an_epoch_of_unequal_length, True)
    assert same_bits(first, second)
    first, second = two.run(after_an_epoch_of_unequal_length, False)
    assert not same_bits(first, second)


def warned_of(before: bool) -> bool:
    """Whether the first step warns of an optimizer that was made before ``fully_shard``, which replaces parameters."""
    model = network()
    early = SAM(model.parameters(), rho=RHO, **SGD)
    fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    step = TrainStep(model, early if before else SAM(model.parameters(), rho=RHO, **SGD), loss_of)
    with torch.no_grad():  # an evaluation, after which the root keeps the weights that it has gathered
        model(my_share(batches(1)[0])[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(*my_share(batches(1)[0]))
    return any("none of the model's trainable parameters" in str(warning.message) for warning in caught)


def test_an_optimizer_made_before_fully_shard_is_warned_of(two: Group) -> None:
    assert two.run(warned_of, True) == [True, True]
    assert two.run(warned_of, False) == [False, False]


def after_a_pass_that_raised(place: str, style: str) -> list[Tensor]:
    """Steps after one that raises in the middle of a pass: the only one of a step that does not perturb, with and
    without first_step, or the first one of a TrainStep that does.
    """
    model = parallel("fsdp")
    perturbs = style == "TrainStep"
    optimizer = SAM(model.parameters(), rho=RHO, schedule=Schedule() if perturbs else SCHEDULE, **SGD)
    step = TrainStep(model, optimizer, loss_of)
    x, y = my_share(batches(1)[0])

    def fails(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if place == "forward":
            raise ZeroDivisionError

        def raises(grad: Tensor) -> None:
            raise ZeroDivisionError

        output.register_hook(raises)
        return output

    handle = model[0 if place == "backward" else 2].register_forward_hook(fails)
    try:
        if perturbs:
            step(x, y)
        if style == "first_step":
            optimizer.first_step()
        with optimizer.second_pass(model):
            loss_of(model, x, y).backward()
    except ZeroDivisionError:
        handle.remove()
    optimizer.zero_grad()
    optimizer._schedule = SCHEDULE
    for batch in batches(STEPS):
        step(*my_share(batch))
    return weights(model)


@pytest.mark.guarantee(id="train-step-interrupted")
@pytest.mark.parametrize("style", ["first_step", "second_pass alone", "TrainStep"])
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_pass_that_raises_leaves_nothing_behind(two: Group, place: str, style: str) -> None:
    found = two.run(after_a_pass_that_raised, place, style)
    torch.testing.assert_close(found[0], one_process(2, 1, None), **TOLERANCE)
