"""TrainStep in loops of Accelerate and Fabric; several processes in them and in Transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from oracle import batches, furthest, plain_step, small_net
from plain_sam import PlainSAM
from processes import launch
from two_processes import LR, RHO, layer_norm_net

from sam_fast import SAM, TrainStep, unwrap

ByTwo = Callable[[str], dict[str, Any]]

CLOSE = 1e-8
"""TrainStep's clipping has its factor in float32."""


def plain_run(model: Any = None, made: Any = None, clip: float | None = 0.2) -> Any:
    model = small_net() if model is None else model
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    for batch in batches() if made is None else made:
        plain_step(model, sam, [batch], oracle.cross_entropy, 1, clip)
    return model


def accelerated(**options: Any) -> tuple[Any, Any, Any]:
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed: make test-integrations")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = small_net()
    return accelerator, *accelerator.prepare(model, SAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9))


@pytest.mark.guarantee(id="frameworks")
@pytest.mark.parametrize("inside", [False, True])
def test_accelerate(inside: bool):
    accelerator, model, optimizer = accelerated()
    step = TrainStep(model, optimizer, oracle.cross_entropy, clip_grad_norm=0.2, backward=accelerator.backward)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(unwrap(optimizer), lambda step: 1.0))
    for batch in batches():
        if inside:
            with accelerator.accumulate(model):
                step(batch)
        else:
            step(batch)
        schedule.step()
    assert furthest(accelerator.unwrap_model(model), plain_run()) < CLOSE
    assert schedule.scheduler.last_epoch == 7


def test_accelerate_by_hand_in_float16():
    """Both passes written out, and the step by Accelerate, which unscales."""
    accelerator, model, optimizer = accelerated()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerator.scaler, accelerator.native_amp = scaler, True  # Accelerator makes none on the CPU
    accelerator.state._mixed_precision = "fp16"
    sam = unwrap(optimizer)
    optimizer = accelerator._optimizers[0] = type(optimizer)(sam, scaler=scaler)
    for batch in batches():
        accelerator.backward(oracle.cross_entropy(model, batch))
        sam.first_step(zero_grad=True)
        with sam.second_pass(model):
            accelerator.backward(oracle.cross_entropy(model, batch))
        accelerator.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**10
    assert furthest(accelerator.unwrap_model(model), plain_run()) < CLOSE


def test_accelerate_resumes_with_the_same_bits(tmp_path: Path):
    accelerator, model, optimizer = accelerated()
    step = TrainStep(model, optimizer, oracle.cross_entropy, backward=accelerator.backward)
    for number, batch in enumerate(batches()):
        if number == 4:
            accelerator.save_state(str(tmp_path))
        step(batch)
    whole = oracle.state_of(accelerator.unwrap_model(model))
    accelerator, model, optimizer = accelerated()
    step = TrainStep(model, optimizer, oracle.cross_entropy, backward=accelerator.backward)
    accelerator.load_state(str(tmp_path))
    for batch in batches()[4:]:
        step(batch)
    assert furthest(accelerator.unwrap_model(model), whole) == 0.0


def test_accumulation_by_accelerate_is_an_error():
    accelerator, model, optimizer = accelerated(gradient_accumulation_steps=2)
    for backward in (accelerator.backward, lambda loss: accelerator.backward(loss)):
        with pytest.raises(ValueError, match="micro_batches="):
            TrainStep(model, optimizer, oracle.cross_entropy, backward=backward)
    with pytest.raises(ValueError, match="micro_batches="):
        TrainStep(model, unwrap(optimizer), oracle.cross_entropy, backward=accelerator.backward)
    step = TrainStep(model, optimizer, oracle.cross_entropy)
    before = [p.detach().clone() for p in model.parameters()]
    with accelerator.accumulate(model), pytest.raises(RuntimeError, match="leave accumulate"):
        step(batches()[0])
    assert all(p.equal(w) for p, w in zip(model.parameters(), before, strict=True))


def test_closures_in_accumulate_are_an_error():
    accelerator, model, optimizer = accelerated(gradient_accumulation_steps=2)

    def train() -> None:
        for batch in batches():
            with accelerator.accumulate(model):
                accelerator.backward(oracle.cross_entropy(model, batch))
                optimizer.step(lambda batch=batch: accelerator.backward(oracle.cross_entropy(model, batch)))
                optimizer.zero_grad()

    with pytest.raises(RuntimeError, match="micro_batches="):
        train()


def test_accelerates_scheduler_sees_a_skipped_step():
    accelerate = pytest.importorskip("accelerate")
    _, model, optimizer = accelerated()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    optimizer = type(optimizer)(unwrap(optimizer), scaler=scaler)  # Accelerator makes none on the CPU
    schedule = torch.optim.lr_scheduler.LambdaLR(unwrap(optimizer), lambda step: 1.0)
    seen = accelerate.scheduler.AcceleratedScheduler(schedule, [optimizer])
    scaled = {"scale": float("inf")}
    step = TrainStep(
        model, optimizer, oracle.cross_entropy, backward=lambda loss: (scaler.scale(loss) * scaled["scale"]).backward()
    )
    before = [p.detach().clone() for p in model.parameters()]
    step(batches()[0])
    seen.step()
    assert optimizer.step_was_skipped
    assert schedule.last_epoch == 0
    assert all(p.equal(w) for p, w in zip(model.parameters(), before, strict=True))
    scaled["scale"] = 1.0
    step(batches()[1])
    seen.step()
    assert not optimizer.step_was_skipped
    assert schedule.last_epoch == 1


def test_fabric():
    fabric = pytest.importorskip("lightning.fabric", reason="Lightning is not installed: make test-integrations")
    engine = fabric.Fabric(accelerator="cpu", devices=1)
    model = small_net()
    model, optimizer = engine.setup(model, SAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9))
    step = TrainStep(model, optimizer, oracle.cross_entropy, clip_grad_norm=0.2, backward=engine.backward)
    for batch in batches():
        step(batch)
    assert furthest(model.module, plain_run()) < CLOSE


def test_fabric_in_float16_with_a_scaler():
    """Clipping sees unscaled gradients, and a step that overflows is skipped."""
    fabric = pytest.importorskip("lightning.fabric", reason="Lightning is not installed: make test-integrations")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    plugin = fabric.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    engine = fabric.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    model, plain = small_net(torch.float32), small_net(torch.float32)
    model, optimizer = engine.setup(model, SAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9))
    step = TrainStep(model, optimizer, oracle.cross_entropy, clip_grad_norm=0.2, backward=engine.backward)
    made = batches(dtype=torch.float32)
    step(made[0])
    assert scaler.get_scale() == 2.0**39
    assert all(p.equal(q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    scaler.update(2.0**10)
    for batch in made[1:]:
        step(batch)

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            out = model(batch[0])
        return torch.nn.functional.cross_entropy(out.float(), batch[1])

    sam = PlainSAM(plain.parameters(), rho=RHO, lr=LR, momentum=0.9)
    plain(made[0][0])  # the statistics have seen it
    for batch in made[1:]:
        plain_step(plain, sam, [batch], loss_fn, 1, 0.2)
    assert scaler.get_scale() == 2.0**10  # no further step was skipped
    assert furthest(model.module, plain) < 2e-3


def test_fabric_resumes_with_the_same_bits(tmp_path: Path):
    fabric = pytest.importorskip("lightning.fabric", reason="Lightning is not installed: make test-integrations")
    engine = fabric.Fabric(accelerator="cpu", devices=1)
    found = []
    for resumed in (False, True):
        model = small_net()
        model, optimizer = engine.setup(model, SAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9))
        step = TrainStep(model, optimizer, oracle.cross_entropy, backward=engine.backward)
        if resumed:
            engine.load(tmp_path / "state", {"model": model, "optimizer": optimizer})
        for number, batch in enumerate(batches()):
            if number == 4 and not resumed:
                engine.save(tmp_path / "state", {"model": model, "optimizer": optimizer})
            if number >= 4 or not resumed:
                step(batch)
        found.append(model.module)
    assert furthest(*found) == 0.0


# ---- Two processes ---------------------------------------------------------------------------------------------------


FAMILIES = [("accelerate", "accelerate_fsdp2"), ("transformers", "transformers_fsdp2"), ("fabric", "lightning_fsdp2")]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> ByTwo:
    """What two processes have trained. They start slowly, so they do all frameworks of a family."""
    folder = tmp_path_factory.mktemp("two")

    def trained(framework: str) -> dict[str, Any]:
        family = next(family for family in FAMILIES if framework in family)
        if not (folder / family[0]).exists():
            launch(Path(__file__).with_name("two_processes.py"), [str(folder), *family], 2, folder)
        state: dict[str, Any] = torch.load(folder / framework)
        return state

    return trained


@pytest.mark.guarantee(id="frameworks")
@pytest.mark.parametrize("framework", ["accelerate", "accelerate_fsdp2", "fabric", "lightning_fsdp2"])
def test_two_processes(framework: str, by_two: ByTwo):
    pytest.importorskip("accelerate" if "accelerate" in framework else "lightning")
    x, y = oracle.data(24)
    made = list(zip(x.split(8), y.split(8), strict=True))
    assert furthest(by_two(framework), plain_run(layer_norm_net(), made)) < CLOSE


@pytest.mark.parametrize("framework", ["transformers", "transformers_fsdp2"])
def test_two_processes_in_transformers(framework: str, by_two: ByTwo):
    """Every process accumulates two batches: four are a step, and the last has two."""
    pytest.importorskip("transformers", reason="Transformers is not installed: make test-integrations")
    import trainer_runs

    plain = trainer_runs.language_model()
    trainer_runs.plain_run(plain, 4, rows=12)
    assert furthest(by_two(framework), plain) < 1e-6
