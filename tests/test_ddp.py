"""DistributedDataParallel, with real processes: both meanings of the perturbation, DDP's options, and what happens when
a process fails.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from cases import same_bits, values
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
from plain_sam import PlainSAM
from processes import group_of
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from sam_fast import SAM


def equal(found: list[list[Tensor]], expected: list[Tensor]) -> None:
    """All ranks have the same bits, and they are the expected weights up to rounding."""
    assert all(same_bits(of_rank, found[0]) for of_rank in found)
    torch.testing.assert_close(found[0], expected, **TOLERANCE)


# ---- Both meanings ---------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket-view": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "small-buckets": {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True},
}


def trained(sync: bool, flatten: bool = False, micro_batches: int = 1, steps: int = 20, **options: Any) -> list[Tensor]:
    model = DistributedDataParallel(network(), **options)
    optimizer = SAM(model.parameters(), rho=RHO, flatten=flatten, **SGD)
    data = [my_share(batch) for batch in batches(steps)]
    if options.get("static_graph") and not sync:
        with (
            pytest.raises(ValueError, match=r"static_graph.*sync=True in the first step"),
            optimizer.first_pass(model, sync=False),
        ):
            raise AssertionError("not reached")
        mse_loss(model(data[0][0]), data[0][1]).backward()
        optimizer.zero_grad()
    train(model, optimizer, data, sync, micro_batches)
    return weights(model)


WITH_TWO_AND_FOUR = [("two", name) for name in OPTIONS] + [("four", "plain"), ("four", "small-buckets")]


@pytest.mark.guarantee(id="ddp")
@pytest.mark.parametrize(("processes", "options"), WITH_TWO_AND_FOUR)
def test_synchronised_is_one_process_with_the_whole_batch(request, processes, options):
    equal(request.getfixturevalue(processes).run(trained, True, **OPTIONS[options]), one_process())


@pytest.mark.guarantee(id="ddp")
@pytest.mark.parametrize(("processes", "options"), WITH_TWO_AND_FOUR)
def test_local_is_each_process_perturbed_along_its_own_gradient(request, processes, options):
    group = request.getfixturevalue(processes)
    equal(group.run(trained, False, **OPTIONS[options]), each_its_own(group.size))


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["bucket-view"]], ids=["plain", "bucket-view"])
def test_flat_gradients_and_ddp(two, options):
    equal(two.run(trained, True, flatten=True, **options), one_process())
    equal(two.run(trained, False, flatten=True, **options), each_its_own(2))


@pytest.mark.parametrize("sync", [True, False], ids=["synchronised", "local"])
def test_gradient_accumulation(two, sync):
    found = two.run(trained, sync, micro_batches=2, gradient_as_bucket_view=True)
    equal(found, one_process() if sync else each_its_own(2))


def joined(sync: bool) -> list[Tensor]:
    model = DistributedDataParallel(network())
    optimizer = SAM(model.parameters(), rho=RHO, **SGD)
    with model.join():
        train(model, optimizer, [my_share(batch) for batch in batches(4 + 2 * distributed.get_rank())], sync)
    return weights(model)


def test_a_process_that_runs_out_of_batches(two):
    """join(): the gradients of a process that has no batches left are zeros."""
    model = network()
    alone = PlainSAM(model.parameters(), rho=RHO, **SGD)
    for i, batch in enumerate(batches(6)):
        for step in (alone.first_step, alone.second_step):
            for index in (0, 1) if i < 4 else (1,):
                x, y = share(batch, index, 2)
                (mse_loss(model(x), y) / 2).backward()
            step()
    equal(two.run(joined, True), weights(model))
    local = two.run(joined, False)
    assert same_bits(local[0], local[1])


def many_local_steps() -> list[Tensor]:
    model = DistributedDataParallel(network(torch.float32))
    optimizer = SAM(model.parameters(), rho=0.5, adaptive=True, lr=0.05, momentum=0.9)
    train(model, optimizer, [my_share(batch) for batch in batches(200, torch.float32)], sync=False)
    return weights(model)


@pytest.mark.guarantee(id="replicas")
def test_after_200_local_steps_all_processes_hold_the_same_bits(four):
    found = four.run(many_local_steps)
    assert all(w.isfinite().all() for w in found[0])
    assert all(same_bits(of_rank, found[0]) for of_rank in found)


def warned_of(inner: bool, sync: bool) -> list[str]:
    """What is warned of in local steps of a model in DDP, or of what is in it, where DDP cannot be told."""
    model = DistributedDataParallel(network())
    optimizer = SAM(model.parameters(), rho=RHO, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with optimizer.first_pass([nn.Tanh(), model.module if inner else model], sync=sync):
            pass
    return [f"{warning.filename} {warning.message}" for warning in caught]


def test_a_local_pass_of_what_is_inside_ddp_is_warned_of(two):
    for (text,) in two.run(warned_of, inner=True, sync=False):
        assert text.startswith(__file__)
        assert "pass the DistributedDataParallel itself" in text
    assert two.run(warned_of, inner=False, sync=False) == two.run(warned_of, inner=True, sync=True) == [[], []]


# ---- Communication ---------------------------------------------------------------------------------------------------


def all_reduces(sync: bool | None) -> tuple[int, list[str]]:
    """How many gradients DDP has reduced in two passes of SAM (or of nothing but the passes), and what the two steps
    communicate.
    """
    model = DistributedDataParallel(network(), bucket_cap_mb=1e9)
    count = 0

    def hook(state, bucket):  # DDP inspects the annotations, which must not be strings
        nonlocal count
        count += len(bucket.gradients())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(distributed.group.WORLD, hook)
    optimizer = SAM(model.parameters(), rho=RHO, **SGD)
    x, y = my_share(batches(1)[0])
    with optimizer.first_pass(model, sync=sync is not False):
        mse_loss(model(x), y).backward()
    if sync is None:
        mse_loss(model(x), y).backward()
        return count, []
    started = collectives(lambda: optimizer.first_step(zero_grad=True))
    with optimizer.second_pass(model):
        mse_loss(model(x), y).backward()
    return count, started + collectives(optimizer.second_step)


def test_the_steps_communicate_nothing(two):
    assert two.run(all_reduces, None) == [(12, [])] * 2
    assert two.run(all_reduces, True) == [(12, [])] * 2
    assert two.run(all_reduces, False) == [(6, [])] * 2


# ---- Unused parameters, BatchNorm ------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two networks, of which one is used at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([network(), network()])
        self.used = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.branches[self.used](x)
        return out


def branches(
    sync: bool, used: list[tuple[int, int]], set_to_none: bool = True
) -> tuple[list[Tensor], list[bool], list[bool]]:
    """A step whose passes use these branches, by rank; the weights, which of them first_step moved, and which the whole
    step has changed.
    """
    inner = Branches()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    optimizer = SAM(model.parameters(), rho=RHO, lr=0.1)
    x, y = my_share(batches(1)[0])
    before = values(list(model.parameters()))
    inner.used, second = used[distributed.get_rank()]
    with optimizer.first_pass(model, sync=sync):
        mse_loss(model(x), y).backward()
    optimizer.first_step()
    optimizer.zero_grad(set_to_none)
    moved = [not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True)]
    inner.used = second
    with optimizer.second_pass(model):
        mse_loss(model(x), y).backward()
    optimizer.second_step(zero_grad=True)
    after = values(list(model.parameters()))
    return after, moved, [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]


FIRST, SECOND, BOTH = [True] * 6 + [False] * 6, [False] * 6 + [True] * 6, [True] * 12


def test_every_process_uses_parameters_of_its_own(two):
    for sync, moved in ((True, [BOTH, BOTH]), (False, [FIRST, SECOND])):
        found = two.run(branches, sync, [(0, 0), (1, 1)])
        assert same_bits(found[0][0], found[1][0])
        assert [of_rank[1] for of_rank in found] == moved
        assert [of_rank[2] for of_rank in found] == [BOTH, BOTH]


def test_the_second_pass_uses_other_parameters_than_the_first(two):
    # A local first pass needs zeros for None: DDP remembers that there was a gradient, and counts on it.
    for sync, set_to_none in ((True, True), (True, False), (False, False)):
        found = two.run(branches, sync, [(0, 1), (0, 1)], set_to_none)
        assert same_bits(found[0][0], found[1][0])
        assert [of_rank[1:] for of_rank in found] == [(FIRST, SECOND)] * 2


class SynchronisedNorm(nn.Module):
    """What SyncBatchNorm does, which torch has for GPUs only: the statistics of a batch are those of all processes."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        mean = distributed.nn.functional.all_reduce(x.mean(0)) / distributed.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
        return x - mean


def statistics(synchronised: bool, sync: bool, broadcast: bool) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """After each step the statistics, and what they were after its first pass."""
    torch.manual_seed(distributed.get_rank())
    middle = SynchronisedNorm(13) if synchronised else nn.BatchNorm1d(13, momentum=0.3, dtype=torch.float64)
    inner = nn.Sequential(nn.Linear(7, 13, dtype=torch.float64), middle, nn.Linear(13, 3, dtype=torch.float64))
    model = DistributedDataParallel(inner, broadcast_buffers=broadcast)
    optimizer = SAM(model.parameters(), rho=RHO, lr=0.1)
    after_step, after_pass = [], []
    for batch in batches(4):
        x, y = my_share(batch)
        with optimizer.first_pass(model, sync=sync):
            mse_loss(model(x), y).backward()
        after_pass.append(values(list(inner.buffers())))
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            mse_loss(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        after_step.append(values(list(inner.buffers())))
    return after_step, after_pass


@pytest.mark.parametrize("broadcast", [True, False], ids=["broadcast", "no-broadcast"])
@pytest.mark.parametrize("sync", [True, False], ids=["synchronised", "local"])
def test_statistics_are_those_of_the_first_passes(two, sync, broadcast):
    found = two.run(statistics, False, sync, broadcast)
    for after_step, after_pass in found:
        assert all(same_bits(a, b) for a, b in zip(after_step, after_pass, strict=True))
        assert [int(buffers[2]) for buffers in after_step] == [1, 2, 3, 4]
    # With broadcast buffers a pass starts from rank 0's; each rank then adds its own batch.
    gap = (found[0][0][-1][0] - found[1][0][-1][0]).abs().max()
    assert gap > 0
    first, second = ([of_rank[1][i][0] for of_rank in found] for i in (0, 1))
    started = [
        (new - 0.7 * old).sub(found[0][1][1][0] - 0.7 * found[0][1][0][0])
        for new, old in zip(second, first, strict=True)
    ]
    assert started[0].abs().max() == 0
    assert gap < 10


def test_statistics_of_all_processes_together(two):
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3)), nn.SyncBatchNorm)
    for sync in (True, False):
        (after_step, after_pass), of_other = two.run(statistics, True, sync, True)
        assert all(same_bits(a, b) for a, b in zip(after_step, after_pass, strict=True))
        assert same_bits([b for step in after_step for b in step], [b for step in of_other[0] for b in step])


# ---- Failures --------------------------------------------------------------------------------------------------------


def fails_in_the_second_pass(sync: bool) -> tuple[bool, bool, str, float]:
    """Rank 1 raises; the others wait for it in the backward pass until the group's timeout."""
    model = DistributedDataParallel(network())
    optimizer = SAM(model.parameters(), rho=RHO, lr=0.1)
    before = values(list(model.parameters()))
    x, y = my_share(batches(1)[0])
    with optimizer.first_pass(model, sync=sync):
        mse_loss(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    assert not same_bits(values(list(model.parameters())), before)
    start, text = time.monotonic(), ""
    try:
        with optimizer.second_pass(model):
            if distributed.get_rank() == 1:
                raise RuntimeError("no memory")
            mse_loss(model(x), y).backward()
    except RuntimeError as error:
        text = str(error)
    return same_bits(values(list(model.parameters())), before), optimizer.perturbed, text, time.monotonic() - start


@pytest.mark.guarantee(id="failing-process")
def test_a_process_that_raises_in_its_second_pass_leaves_none_perturbed():
    timeout = 2.0
    with group_of(2, timeout) as group:
        found = group.run(fails_in_the_second_pass, False)
    assert [(same, perturbed) for same, perturbed, _, _ in found] == [(True, False)] * 2
    assert found[1][2] == "no memory"
    assert found[0][2] not in ("", "no memory")
    assert found[0][3] < timeout + 3.0


def overflows(first: bool, by_hand: bool) -> tuple[bool, float, list[Tensor]]:
    """Local: rank 1's gradient is not finite, in the first pass or in the second. By hand: with DDP's ``no_sync``."""
    model = DistributedDataParallel(network(torch.float32))
    optimizer = SAM(model.parameters(), rho=RHO, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = values(list(model.parameters()))
    for is_first in (True, False):
        x, y = my_share(batches(1, torch.float32)[0])
        if distributed.get_rank() == 1 and first == is_first:
            x = x * torch.inf
        if is_first:
            with model.no_sync() if by_hand else optimizer.first_pass(model, sync=False):
                scaler.scale(mse_loss(model(x), y)).backward()
            optimizer.first_step(zero_grad=True)
        else:
            with optimizer.second_pass(model):
                scaler.scale(mse_loss(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    after = values(list(model.parameters()))
    return same_bits(after, before), scaler.get_scale(), after


@pytest.mark.guarantee(id="failing-process")
@pytest.mark.parametrize("by_hand", [False, True], ids=["first_pass", "no_sync"])
@pytest.mark.parametrize("first", [True, False], ids=["first-pass", "second-pass"])
def test_processes_agree_on_an_overflow_of_one_of_them(two, first, by_hand):
    found = two.run(overflows, first, by_hand)
    assert [(same, scale) for same, scale, _ in found] == [(not first, 8.0 if first else 4.0)] * 2
    assert same_bits(found[0][2], found[1][2])
