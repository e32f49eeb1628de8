"""SAMTrainerMixin where the forward pass is another: bfloat16, float16 with a scaler, compiled, checkpointed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import Record, furthest, plain_step, windows
from plain_sam import PlainSAM
from torch import Tensor, nn
from trainer_runs import CLIP, CLOSE, LR, RHO, SAMTrainer, batches, groups_of, language_model, logged, plain_run, train
from trainer_runs import sum_of_losses as loss_of


def test_bfloat16(tmp_path: Any):
    model, plain = language_model(dtype=torch.float32), language_model(dtype=torch.float32)
    train(tmp_path, model, gradient_accumulation_steps=2, bf16=True)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, batch)

    plain_run(plain, 2, loss_fn=loss_fn)
    assert furthest(model, plain) < 2e-2
    assert furthest(model, language_model(dtype=torch.float32)) > 0.2


class Float16(SAMTrainer):
    """Accelerate leaves fp16=True out of account on CPUs: this is what it makes of it on GPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19, growth_interval=1000)
        self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"


def test_float16_with_a_scaler(tmp_path: Any):
    """Gradients are unscaled and clipped; steps that overflow are skipped, and the learning rate waits for them."""
    model, plain = language_model(dtype=torch.float32), language_model(dtype=torch.float32)
    trainer = train(tmp_path, model, cls=Float16, optim="sgd", gradient_accumulation_steps=2, learning_rate=1.0)
    norms = list(zip(logged(trainer, "sam/grad_norm"), logged(trainer, "grad_norm"), strict=True))
    skipped = [number for number, both in enumerate(norms) if not all(map(math.isfinite, both))]
    assert 1 <= len(skipped) <= 4
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (19 - len(skipped))
    assert trainer.lr_scheduler.last_epoch == 8 - len(skipped)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return loss_of(model, batch)

    sam, record = PlainSAM(groups_of(plain), rho=RHO, lr=1.0), Record()
    schedule = torch.optim.lr_scheduler.LambdaLR(sam.base, lambda step: 1 - step / 8)
    for number, window in enumerate([*windows(batches(), 2), *windows(batches(), 2)]):
        if number not in skipped:
            tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
            plain_step(plain, sam, window, loss_fn, tokens, CLIP, record)
            schedule.step()
    found = [first for number, (first, _) in enumerate(norms) if number not in skipped]
    assert found == pytest.approx(record.norms, rel=1e-2)
    assert furthest(model, plain) < 1e-4
    assert furthest(model, language_model(dtype=torch.float32)) > 0.05


def test_torch_compile(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments sets it and leaves it
    compiled: list[Any] = []

    class Notes(SAMTrainer):
        def training_step(self, model: nn.Module, *args: Any) -> Tensor:
            compiled.append(hasattr(model, "_orig_mod") or model._compiled_call_impl is not None)
            return super().training_step(model, *args)

    model, plain = language_model(), language_model()
    train(tmp_path, model, cls=Notes, torch_compile_backend="eager", gradient_accumulation_steps=2)
    plain_run(plain, 2)
    assert compiled == [True] * 14
    assert furthest(model, plain) < CLOSE


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Any):
    """Dropout included: recomputation draws what its own pass drew."""
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    model, plain = language_model(), language_model()
    train(tmp_path, model, **options)
    plain_run(plain, 2)
    assert furthest(model, plain) < CLOSE
    checkpointed, ordinary = language_model(0.3), language_model(0.3)
    train(tmp_path, checkpointed, **options, num_train_epochs=1)
    train(tmp_path, ordinary, gradient_accumulation_steps=2, num_train_epochs=1)
    assert furthest(checkpointed, ordinary) < CLOSE
    assert furthest(ordinary, plain) > LR
