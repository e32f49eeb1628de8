"""SAMCallback: training runs in Lightning, each against a plain loop."""

from __future__ import annotations

import math
import warnings
from typing import Any

import oracle
import pytest
import torch
from lightning_runs import (
    CLOSE,
    LR,
    RHO,
    Module,
    Values,
    fit,
    half_precision,
    loader,
    plain_run,
    trainer,
)
from oracle import batches, furthest, plain_step, small_net, windows
from plain_sam import PlainSAM
from torch import Tensor, nn

from sam_fast import Schedule
from sam_fast.integrations.lightning import SAMCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.guarantee(id="frameworks")
@pytest.mark.parametrize("accumulate", [1, 2, 3])  # 7 batches: the last windows of 2 and 3 are ragged
@pytest.mark.parametrize("clip", [None, 0.05])
def test_training(accumulate: int, clip: float | None):
    module, logger = Module(), Values()
    made = fit(module, accumulate_grad_batches=accumulate, gradient_clip_val=clip, logger=logger)
    model, record = plain_run(accumulate=accumulate, clip=clip)
    assert furthest(module.net, model) < CLOSE
    assert made.global_step == len(record.losses)
    assert logger.of("sam/grad_norm") == pytest.approx(record.norms, rel=1e-6)
    assert logger.of("sam/sharpness") == pytest.approx(record.sharpness, rel=1e-4, abs=1e-6)
    assert module.seen.count("before_step") == len(record.losses)
    assert module.seen.count("after_backward") == 14


def test_a_part_of_the_batch_for_the_first_pass():
    module = Module()
    fit(module, SAMCallback(ascent=0.5), accumulate_grad_batches=2)
    model, _ = plain_run(accumulate=2, ascent=2)
    assert furthest(module.net, model) < CLOSE


def test_extra_buffers_move_in_the_first_pass_alone():
    class Counting(Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("uses", torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.uses += 1
            return super().training_step(batch, batch_idx)

    module = Counting()
    fit(module, SAMCallback(extra_buffers="uses"), max_epochs=1, accumulate_grad_batches=2)
    assert int(module.uses) == 7


def test_the_same_masks_in_both_passes():
    module = Module(dropout=0.5)
    torch.manual_seed(5)
    fit(module, SAMCallback(replay_rng=True), max_epochs=1, accumulate_grad_batches=2)
    model = small_net(dropout=0.5)
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    torch.manual_seed(5)
    torch.empty((), dtype=torch.int64).random_()  # the DataLoader draws a seed
    for window in windows(batches(), 2):
        states: dict[int, Tensor] = {}

        def loss_fn(model: nn.Module, batch: Any, states: dict[int, Tensor] = states) -> Tensor:
            if id(batch) not in states:
                states[id(batch)] = torch.get_rng_state()
                return oracle.cross_entropy(model, batch)
            after = torch.get_rng_state()
            torch.set_rng_state(states[id(batch)])
            loss = oracle.cross_entropy(model, batch)
            torch.set_rng_state(after)
            return loss

        plain_step(model, sam, window, loss_fn, 2)
    assert furthest(module.net, model) < CLOSE


def test_a_compiled_module():
    class Plain(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return oracle.cross_entropy(self.net, batch)

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    module = Plain()
    trainer(SAMCallback(), accumulate_grad_batches=2).fit(torch.compile(module, backend=backend), loader())
    assert graphs
    assert furthest(module.net, plain_run(accumulate=2)[0]) < CLOSE


# ---- Precision -------------------------------------------------------------------------------------------------------


def test_bf16_mixed():
    module = Module(dtype=torch.float32)
    made = trainer(SAMCallback(), precision="bf16-mixed", accumulate_grad_batches=2)
    made.fit(module, loader(dtype=torch.float32))
    model = small_net(torch.float32)
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return oracle.cross_entropy(model, batch)

    for _ in range(2):
        for window in windows(batches(dtype=torch.float32), 2):
            plain_step(model, sam, window, loss_fn, 2)
    assert furthest(module.net, model) < 1e-5


def test_float16_with_a_scaler():
    """Scaled gradients, and a step that is skipped because the first pass has overflowed."""
    plugin = half_precision(2.0**24)
    module, logger = Module(dtype=torch.float32), Values()
    made = trainer(SAMCallback(), plugins=[plugin], logger=logger)
    made.fit(module, loader(dtype=torch.float32))
    model = small_net(torch.float32)
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return oracle.cross_entropy(model, batch)

    norms = logger.of("sam/grad_norm")
    skipped = [number for number, norm in enumerate(norms) if not math.isfinite(norm)]
    assert plugin.scaler.get_scale() == 2.0 ** (24 - len(skipped))
    record = oracle.Record()
    for number, batch in enumerate([*batches(dtype=torch.float32), *batches(dtype=torch.float32)]):
        if number in skipped:
            with torch.no_grad():
                loss_fn(model, batch)  # the statistics have seen it
        else:
            plain_step(model, sam, [batch], loss_fn, 1, record=record)
    assert furthest(module.net, model) < 2e-3
    assert [n for n in norms if math.isfinite(n)] == pytest.approx(record.norms, rel=2e-2)


# ---- Steps of other kinds --------------------------------------------------------------------------------------------


def test_a_schedule():
    """Every second step is the base optimizer's, with one pass."""
    module, logger = Module(schedule=Schedule(every=2)), Values()
    fit(module, accumulate_grad_batches=2, logger=logger, max_epochs=2)
    model = small_net()
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    for number, window in enumerate([*windows(batches(), 2), *windows(batches(), 2)]):
        if number % 2 == 0:
            plain_step(model, sam, window, oracle.cross_entropy, 2)
        else:
            for batch in window:
                (oracle.cross_entropy(model, batch) / 2).backward()
            sam.base.step()
            sam.zero_grad()
    assert furthest(module.net, model) < CLOSE
    norms = logger.of("sam/grad_norm")
    assert norms[::2] == norms[1::2]  # Lightning repeats what a step does not log
    assert len(set(norms)) == 4


@pytest.mark.parametrize("every", [1, 2])
def test_what_was_measured_last_is_logged_every_so_many_steps(every: int):
    module, logger = Module(schedule=Schedule(every=every)), Values()
    fit(module, accumulate_grad_batches=2, logger=logger, log_every_n_steps=2)
    if every == 1:
        assert logger.of("sam/grad_norm") == pytest.approx(plain_run(accumulate=2)[1].norms[1::2], rel=1e-6)
    else:
        every_step = Values()
        fit(Module(schedule=Schedule(every=2)), accumulate_grad_batches=2, logger=every_step)
        assert logger.of("sam/grad_norm") == every_step.of("sam/grad_norm")[::2]
    assert len(logger.of("sam/sharpness")) == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_training_step_replaces_in_its_batch_is_replaced_once_in_each_pass(accumulate: int):
    class Normalizes(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch[0] = batch[0] * 2
            return super().training_step((batch[0] / 2, batch.pop()), batch_idx)

    module = Normalizes()
    fit(module, accumulate_grad_batches=accumulate)
    assert furthest(module.net, plain_run(accumulate=accumulate)[0]) < CLOSE


def test_writing_into_the_batch_is_warned_of():
    class Writes(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch[0].mul_(1.1)
            return super().training_step(batch, batch_idx)

    with pytest.warns(RuntimeWarning, match="has written into tensors of its batch"):
        fit(Writes(), max_epochs=1)


@pytest.mark.parametrize("write", ["in place", "data"])
def test_a_target_network_that_training_step_updates_is_warned_of(write: str):
    """As examples of self-supervised learning do."""

    class Follows(Module):
        def __init__(self) -> None:
            super().__init__()
            self.target = small_net().requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            for p, q in zip(self.target.parameters(), self.net.parameters(), strict=True):
                if write == "data":
                    p.data = 0.9 * p.data + 0.1 * q.data
                else:
                    p.lerp_(q.detach(), 0.1)
            return super().training_step(batch, batch_idx)

    with pytest.warns(RuntimeWarning, match=r"not train, target.0.weight and 5 more"):
        fit(Follows(), max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        fit(Follows(), SAMCallback(extra_buffers="target.*"), max_epochs=1)
        fit(Module(), max_epochs=1)


def test_batches_without_a_loss_are_left_out():
    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (0, 3) else {"loss": super().training_step(batch, batch_idx), "more": 1}

    module = Skips()
    fit(module, max_epochs=1, accumulate_grad_batches=2)
    model = small_net()
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    for window in windows([b for i, b in enumerate(batches())], 2):
        kept = [b for b in window if not any(b[0] is batches()[i][0] or b[0].equal(batches()[i][0]) for i in (0, 3))]
        plain_step(model, sam, kept, oracle.cross_entropy, 2)
    assert furthest(module.net, model) < CLOSE
