"""torch.distributed's own optimizers, as the base of SAM, with real processes."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from cases import same_bits, values
from parallel import RHO, SGD, TOLERANCE, batches, my_share, network, train, weights
from plain_sam import PlainSAM
from torch import Tensor, distributed
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sam_fast import SAM

# ---- ZeroRedundancyOptimizer -----------------------------------------------------------------------------------------


def zero_redundancy(sharded: bool) -> tuple[list[Tensor], int]:
    model = DistributedDataParallel(network())
    options = {"lr": 0.01, "weight_decay": 0.1}
    if sharded:
        optimizer = SAM(
            model.parameters(), ZeroRedundancyOptimizer, rho=RHO, optimizer_class=torch.optim.AdamW, **options
        )
    else:
        optimizer = SAM(model.parameters(), lambda groups, **kw: torch.optim.AdamW(groups, **kw), rho=RHO, **options)
        optimizer.register_step_pre_hook(lambda *_: None)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for batch in batches(5):
        train(model, optimizer, [my_share(batch)])
        scheduler.step()
    return weights(model), len(optimizer.base_optimizer.optim.state) if sharded else 6


def zero_redundancy_misused() -> list[str]:
    model = network()
    texts = []
    for attempt in (
        lambda: SAM(
            model.parameters(), ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD, lr=0.1, overlap_with_ddp=True
        ),
        lambda: SAM(
            model.parameters(),
            ZeroRedundancyOptimizer,
            optimizer_class=torch.optim.SGD,
            lr=0.1,
            flatten=True,
            parameters_as_bucket_view=True,
        ),
        lambda: ZeroRedundancyOptimizer(model.parameters(), SAM, lr=0.1),
    ):
        before = values(list(model.parameters()))
        try:
            optimizer = attempt()
            mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
            optimizer.step()
        except (RuntimeError, ValueError) as error:
            texts.append(f"{type(error).__name__}: {error}")
        assert same_bits(values(list(model.parameters())), before)
    return texts


def test_zero_redundancy_optimizer_as_the_base(two):
    plain, sharded = two.run(zero_redundancy, False), two.run(zero_redundancy, True)
    for of_rank, _ in sharded:
        assert same_bits(of_rank, sharded[0][0])
        torch.testing.assert_close(of_rank, plain[0][0], **TOLERANCE)
    assert sum(states for _, states in sharded) == 6, "each state is on one rank only"
    assert all(states < 6 for _, states in sharded)


def test_zero_redundancy_optimizer_misused(two):
    for overlapped, flat, around in two.run(zero_redundancy_misused):
        assert overlapped.startswith("ValueError: ZeroRedundancyOptimizer with overlap_with_ddp=True")
        assert "leave one of the two out" in flat
        assert around.startswith("RuntimeError: step() without a closure needs first_step()")


def resumed() -> tuple[list[Tensor], list[Tensor]]:
    """Weights of a run that goes on, and of one that is resumed: load_state_dict leaves None for what is another
    rank's.
    """
    found = []
    state: list[bytes | None] = [None]
    for resumes in (False, True):
        model = DistributedDataParallel(network())
        optimizer = SAM(model.parameters(), ZeroRedundancyOptimizer, rho=RHO, optimizer_class=torch.optim.SGD, **SGD)
        if resumes:
            distributed.broadcast_object_list(state)
            at, of_optimizer = pickle.loads(state[0])
            model.load_state_dict(at)
            optimizer.load_state_dict(of_optimizer)
        else:
            train(model, optimizer, [my_share(batch) for batch in batches(3)])
            optimizer.base_optimizer.consolidate_state_dict()
            if distributed.get_rank() == 0:
                state[0] = pickle.dumps((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, [my_share(batch) for batch in batches(6)[3:]])
        found.append(weights(model))
    return found[0], found[1]


def test_zero_redundancy_optimizer_is_resumed(two):
    for one, other in two.run(resumed):
        torch.testing.assert_close(one, other, **TOLERANCE)


# ---- PostLocalSGDOptimizer -------------------------------------------------------------------------------------------


def averaged_now_and_then() -> bool:
    """Replicas that step by themselves and are averaged after every second step."""

    def base(params: Any, **options: Any) -> Optimizer:
        return PostLocalSGDOptimizer(torch.optim.SGD(params, **options), PeriodicModelAverager(2, warmup_steps=0))

    model, reference = network(), network()
    optimizer = SAM(base(model.parameters(), **SGD), rho=RHO)
    alone = PlainSAM(reference.parameters(), base, rho=RHO, **SGD)
    for x, y in [my_share(batch) for batch in batches(5)]:
        train(model, optimizer, [(x, y)])
        for step in (alone.first_step, alone.second_step):
            mse_loss(reference(x), y).backward()
            step()
    torch.testing.assert_close(weights(model), weights(reference), **TOLERANCE)
    return True


def test_post_local_sgd_optimizer_as_the_base(two):
    assert two.run(averaged_now_and_then) == [True, True]
