"""torch.distributed.checkpoint: saved by four processes, resumed by four, two and one; a process killed in the middle
of a step.
"""

from __future__ import annotations

import copy
import os
import signal
from typing import Any

import pytest
import torch
from cases import make_params, same_bits, values
from parallel import RHO, SGD, TOLERANCE, batches, my_share, network, train, weights
from processes import group_of
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from sam_fast import SAM, Schedule
from sam_fast.options import OPTIONS

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, SGD),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
}
SAVED, STEPS = 3, 6
"""The step after which a checkpoint is saved, and the last one."""


def make(kind: str, base: str) -> tuple[nn.Module, SAM]:
    """The network as it is, sharded or with DDP, and its optimizer with its own rho."""
    model: nn.Module = network()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        model = fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    cls, kwargs = BASES[base]
    return model, SAM(model.parameters(), cls, rho=0.0, **kwargs)


def state_of(model: nn.Module, optimizer: SAM) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def resume(folder: str, model: nn.Module, optimizer: SAM) -> None:
    state = state_of(model, optimizer)
    assert all(len(entry) >= 1 for entry in state["optimizer"]["state"].values()), "the state was not made"
    checkpoint.load(state, checkpoint_id=folder, no_dist=not distributed.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def saved_and_finished(folder: str, kind: str, base: str) -> list[Tensor]:
    model, optimizer = make(kind, base)
    optimizer.param_groups[0]["rho"] = RHO
    data = [my_share(batch) for batch in batches(STEPS)]
    train(model, optimizer, data[:SAVED])
    checkpoint.save(state_of(model, optimizer), checkpoint_id=folder)
    if kind == "ddp":
        # Between its first step and its second DDP orders its buckets anew, and adds up in another order: here as in
        # the run that resumes.
        model = DistributedDataParallel(model.module)
    train(model, optimizer, data[SAVED:])
    return weights(model)


def resumed(folder: str, kind: str, base: str, last: int = STEPS) -> list[Tensor]:
    model, optimizer = make(kind, base)
    resume(folder, model, optimizer)
    assert optimizer.param_groups[0]["rho"] == RHO, "rho is the checkpoint's"
    train(model, optimizer, [batch if kind == "plain" else my_share(batch) for batch in batches(last)[SAVED:]])
    return weights(model)


@pytest.mark.guarantee(id="distributed-checkpoints")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_saved_by_four_and_resumed_by_four_two_and_one(four, two, tmp_path, kind, base):
    folder = str(tmp_path / "checkpoint")
    finished = four.run(saved_and_finished, folder, kind, base)
    for one, other in zip(four.run(resumed, folder, kind, base), finished, strict=True):
        assert same_bits(one, other)
    for found in [*two.run(resumed, folder, "fsdp", base), resumed(folder, "plain", base)]:
        torch.testing.assert_close(found, finished[0], **TOLERANCE)


@pytest.mark.parametrize("to_sam", [True, False])
def test_checkpoints_move_between_plain_optimizers_and_sam(tmp_path, to_sam):
    model, other = network(), network()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    ((x, y),) = batches(1)
    mse_loss(model(x), y).backward()
    plain.step()
    saved: Any = plain if to_sam else SAM(plain, rho=RHO, schedule=Schedule(every=2))
    checkpoint.save(state_of(model, saved), checkpoint_id=str(tmp_path), no_dist=True)
    options: dict[str, Any] = {"rho": 0.5, "schedule": Schedule(every=3)} if to_sam else {}
    loaded: Any = torch.optim.AdamW(other.parameters(), lr=0.5)
    loaded = SAM(loaded, **options) if to_sam else loaded
    state = state_of(other, loaded)
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=to_sam)
    checkpoint.load(state, checkpoint_id=str(tmp_path), no_dist=True, planner=planner)
    set_state_dict(other, loaded, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert same_bits(weights(other), weights(model))
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(loaded.state[p]["exp_avg"], plain.state[q]["exp_avg"])
    (group,) = loaded.param_groups
    assert (group["lr"], group.get("rho"), group.get("sam_step")) == (0.01, *((0.5, 0) if to_sam else (None, None)))


# ---- Killed ----------------------------------------------------------------------------------------------------------


def killed(folder: str) -> None:
    """Saves after every step, and is killed in the one after SAVED."""
    model, optimizer = make("fsdp", "sgd")
    optimizer.param_groups[0]["rho"] = RHO
    for i, batch in enumerate(batches(STEPS)):
        x, y = my_share(batch)
        mse_loss(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            if i == SAVED and distributed.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            mse_loss(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        checkpoint.save(state_of(model, optimizer), checkpoint_id=f"{folder}/{i + 1}")


@pytest.mark.guarantee(id="distributed-checkpoints")
def test_killed_in_the_middle_of_a_step(two, tmp_path):
    with group_of(2, timeout=5.0) as group:
        outcomes = group.outcomes(killed, str(tmp_path))
    assert outcomes[0] is None, "rank 0 was to die"
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [str(i + 1) for i in range(SAVED)]
    finished = two.run(saved_and_finished, str(tmp_path / "another"), "fsdp", "sgd")
    for one, other in zip(two.run(resumed, str(tmp_path / str(SAVED)), "fsdp", "sgd"), finished, strict=True):
        assert same_bits(one, other)


# ---- Making the state: a step that is none ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_the_state_can_be_made_without_a_first_step(base):
    model = network()
    before = weights(model)
    optimizer = SAM(model.parameters(), base, lr=0.1, weight_decay=0.1)
    state = get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer.perturbed
    assert same_bits(weights(model), before)
    assert len(state["state"]) == (0 if base is torch.optim.SGD else 6)


@pytest.mark.guarantee(id="distributed-checkpoints")
@pytest.mark.parametrize("zeros", ["flatten", "left by zero_grad"])
@pytest.mark.parametrize("base", BASES)
def test_the_state_is_made_where_gradients_are_zeros(tmp_path, base, zeros):
    def made() -> tuple[nn.Module, SAM]:
        model, (cls, options) = network(), BASES[base]
        optimizer = SAM(model.parameters(), cls, rho=RHO, flatten=zeros == "flatten", **options)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return model, optimizer

    model, optimizer = made()
    train(model, optimizer, batches(STEPS)[:SAVED])
    checkpoint.save(state_of(model, optimizer), checkpoint_id=str(tmp_path), no_dist=True)
    train(model, optimizer, batches(STEPS)[SAVED:])
    again, its = made()
    resume(str(tmp_path), again, its)
    train(again, its, batches(STEPS)[SAVED:])
    assert same_bits(weights(again), weights(model))


@pytest.mark.guarantee(id="distributed-checkpoints")
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_a_state_with_flat_keys_is_loaded_without_a_planner(base, flatten):
    """Torch looks only for the states that the optimizer has when it is to load."""
    keys, (cls, options) = StateDictOptions(flatten_optimizer_state_dict=True), BASES[base]
    (model, optimizer), (again, its) = [
        (model, SAM(model.parameters(), cls, rho=RHO, flatten=flatten, **options)) for model in (network(), network())
    ]
    train(model, optimizer, batches(STEPS)[:SAVED])
    again.load_state_dict(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=keys))
    set_optimizer_state_dict(again, its, saved, options=keys)
    for m, o in ((model, optimizer), (again, its)):
        train(m, o, batches(STEPS)[SAVED:])
    assert same_bits(weights(again), weights(model))


@pytest.mark.parametrize("into", ["sam", "plain"])
@pytest.mark.parametrize("base", BASES)
def test_where_torch_raises_a_key_error_the_documented_way_round_loads(base, into):
    """Torch looks in flat keys for every option that the groups have, and in the groups for every option that full
    ones have.
    """
    keys = StateDictOptions(flatten_optimizer_state_dict=into == "sam", full_state_dict=into == "plain")
    cls, options = BASES[base]
    model, again = network(), network()
    plain, its = cls(model.parameters(), **options), cls(again.parameters(), **options)
    sam = SAM(plain, rho=RHO)
    train(model, sam, batches(STEPS)[:SAVED])
    saved: Any = copy.deepcopy(get_optimizer_state_dict(model, sam, options=keys))
    if into == "sam":
        saved = {key: value for key, value in saved.items() if key.split(".")[-1] not in OPTIONS}
    set_optimizer_state_dict(again, its if into == "sam" else SAM(its, rho=RHO), saved, options=keys)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        tensors, loaded = (list(o.state[r].values()) for o, r in ((plain, p), (its, q)))
        assert same_bits(tensors, loaded)


def test_no_state_is_made_where_there_is_a_gradient_or_nobody_asks():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.Adam, lr=0.1, flatten=True)
    assert not optimizer.state_dict()["state"]
    ((x, y),) = batches(1)
    mse_loss(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    assert not get_optimizer_state_dict(model, optimizer)["state"]
    assert same_bits([p.grad for p in model.parameters()], before)


@pytest.mark.parametrize("case", ["a gradient", "a learning rate", "no gradients", "state"])
def test_that_does_not_weaken_the_error(case):
    params = make_params([3, 5])
    optimizer = SAM(params, torch.optim.Adam, lr=0.1)
    for p in params:
        p.grad.zero_()
    if case != "a learning rate":
        optimizer.param_groups[0]["lr"] = 0.0
    if case == "a gradient":
        params[1].grad[4] = 1e-30
    elif case == "no gradients":
        optimizer.zero_grad()
    elif case == "state":
        optimizer.step()
    before = values(params)
    with pytest.raises(RuntimeError, match="needs first_step"):
        optimizer.step()
    assert same_bits(values(params), before)
