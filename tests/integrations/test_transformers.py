"""SAMTrainerMixin: training runs in Transformers' Trainer, each against a plain loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainer_runs
from oracle import furthest
from torch import Tensor, nn
from trainer_runs import (
    CLOSE,
    RHO,
    SAMTrainer,
    batches,
    language_model,
    logged,
    logits_of,
    plain_run,
    text,
    tokenizer,
    train,
    transformers,
)

from sam_fast import SAM, Schedule


@pytest.mark.guarantee(id="frameworks")
@pytest.mark.parametrize("accumulate", [1, 2, 3])  # 7 batches: the last windows of 2 and 3 are ragged
def test_training(accumulate: int, tmp_path: Any):
    """Losses over unequal numbers of tokens, weight decay by groups, clipping, a schedule of the learning rate."""
    model, plain = language_model(), language_model()
    trainer = train(tmp_path, model, gradient_accumulation_steps=accumulate, include_num_input_tokens_seen="all")
    record = plain_run(plain, accumulate)
    assert furthest(model, plain) < CLOSE
    assert trainer.state.global_step == len(record.losses)
    assert logged(trainer, "loss") == pytest.approx(record.losses, abs=1e-4)
    assert logged(trainer, "sam/grad_norm") == pytest.approx(record.norms, rel=1e-6)
    assert logged(trainer, "sam/sharpness") == pytest.approx(record.sharpness, abs=1e-6)
    assert trainer.state.num_input_tokens_seen == 2 * 14 * 8


def test_label_smoothing(tmp_path: Any):
    model, plain = language_model(), language_model()
    train(tmp_path, model, label_smoothing_factor=0.1, gradient_accumulation_steps=2, data=text(ragged=False))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(*logits_of(model, batch), label_smoothing=0.1)

    plain_run(plain, 2, loss_fn=loss_fn, counted=len, made=batches(ragged=False))
    assert furthest(model, plain) < 1e-5  # the Trainer adds up in float32


def test_another_optimizer(tmp_path: Any):
    model, plain = language_model(), language_model()
    trainer = train(tmp_path, model, optim="sgd")
    plain_run(plain, base=torch.optim.SGD)
    assert furthest(model, plain) < CLOSE
    assert type(trainer.optimizer.optimizer.base_optimizer) is torch.optim.SGD


def test_a_sam_of_ones_own(tmp_path: Any):
    model, plain = language_model(), language_model()
    own = SAM(trainer_runs.groups_of(model), torch.optim.AdamW, rho=RHO, lr=trainer_runs.LR)
    args = trainer_runs.arguments(tmp_path)
    SAMTrainer(model=model, args=args, train_dataset=text(), optimizers=(own, None)).train()
    plain_run(plain)
    assert furthest(model, plain) < CLOSE


@pytest.mark.parametrize("given", [{"sam_rho": 9.0}, {"sam_adaptive": False}, {"sam_options": {"eta": 0.1}}])
def test_options_for_a_sam_of_ones_own_are_an_error(given: dict[str, Any], tmp_path: Any):
    class Makes(SAMTrainer):
        def create_optimizer(self, *args: Any) -> Any:
            self.optimizer = SAM(self.model.parameters(), rho=RHO, lr=0.1)
            return self.optimizer

    args, own = trainer_runs.arguments(tmp_path), (torch.optim.AdamW, {"lr": 0.1})
    for cls, more in ((Makes, {}), (SAMTrainer, {"optimizer_cls_and_kwargs": (SAM, {"lr": 0.1})})):
        with pytest.raises(ValueError, match="SAM of your own"):
            cls(model=language_model(), args=args, train_dataset=text(), **more, **given).train()
    trainer = SAMTrainer(model=language_model(), args=args, train_dataset=text(), optimizer_cls_and_kwargs=own, **given)
    trainer.train()
    trainer.train()  # with the SAM that the mixin has made before


def test_a_schedule(tmp_path: Any):
    """Steps that do not perturb make one pass."""
    passes = []

    class Counts(SAMTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            passes.append(self.state.global_step)
            return super().compute_loss(*args, **kwargs)

    train(tmp_path, language_model(), cls=Counts, sam_options={"schedule": Schedule(every=3)}, num_train_epochs=1)
    assert [passes.count(step) for step in range(7)] == [2, 1, 1, 2, 1, 1, 2]


def test_lora(tmp_path: Any):
    """The adapters are perturbed, what is frozen is not."""
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(language_model(), config, autocast_adapter_dtype=False)

    model, plain = adapted(), adapted()
    train(tmp_path, model, gradient_accumulation_steps=2)
    plain_run(plain, 2)
    assert furthest(model, plain) < CLOSE
    assert furthest(model, adapted()) > 0.01


def test_schedule_free(tmp_path: Any):
    """Optimizers that are told before each pass that it is one of training."""
    schedulefree = pytest.importorskip("schedulefree")
    model, plain = language_model(), language_model()
    train(tmp_path, model, optim="schedule_free_sgd", lr_scheduler_type="constant", gradient_accumulation_steps=2)
    plain_run(plain, 2, base=schedulefree.SGDScheduleFree, constant=True)
    assert furthest(model, plain) < CLOSE
    assert furthest(model, language_model()) > 1e-3


@pytest.mark.parametrize("replay", [False, True])
def test_a_resumed_run_has_the_same_bits(replay: bool, tmp_path: Any):
    """From the middle of an epoch, with dropout."""
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 3, "sam_replay_rng": replay}
    options["sam_options"] = {"schedule": Schedule(every=2)}
    whole, resumed = language_model(0.3), language_model(0.3)
    train(tmp_path, whole, save_strategy="steps", save_steps=3, **options)
    train(tmp_path, resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-6"), **options)
    assert furthest(whole, resumed) == 0.0
    assert furthest(whole, language_model()) > 0.1


def test_a_checkpoint_before_the_optimizers_step_holds_w(tmp_path: Any):
    """As enable_jit_checkpoint saves one after SIGTERM; the step that is under way goes on."""

    class Told(SAMTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                by_name = {type(each).__name__: each for each in self.callback_handler.callbacks}
                by_name["JITCheckpointCallback"].jit_manager.is_checkpoint_requested = True  # its timer does so
            return super().compute_loss(*args, **kwargs)

    model, plain, resumed = language_model(), language_model(), language_model()
    stopped = train(tmp_path, model, cls=Told, enable_jit_checkpoint=True, gradient_accumulation_steps=2)
    assert stopped.state.global_step == 3
    saved = type(model).from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float64)
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(tmp_path / "whole", plain, **options)
    assert furthest(saved, type(model).from_pretrained(tmp_path / "whole" / "checkpoint-2", dtype=torch.float64)) == 0.0
    assert furthest(model, type(model).from_pretrained(tmp_path / "whole" / "checkpoint-3", dtype=torch.float64)) == 0.0
    train(tmp_path, resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), gradient_accumulation_steps=2)
    assert furthest(resumed, plain) == 0.0


def test_the_same_masks_in_both_passes(tmp_path: Any):
    """Without a step of rho both passes have the same loss, if they draw the same."""
    for replay in (False, True):
        model = language_model(0.3)
        trainer = train(tmp_path, model, sam_rho=0.0, sam_replay_rng=replay, gradient_accumulation_steps=2)
        assert all(value == 0.0 for value in logged(trainer, "sam/sharpness")) == replay


def test_extra_buffers_move_in_the_first_pass_alone(tmp_path: Any):
    model = language_model()
    model.register_buffer("uses", torch.zeros(()))

    def count(module: Any, args: Any) -> None:
        module.uses += 1

    hook = model.register_forward_pre_hook(count)
    trainer = train(tmp_path, model, sam_extra_buffers="uses", gradient_accumulation_steps=2)
    hook.remove()
    assert int(model.uses) == 7 * trainer.args.num_train_epochs


def test_a_failing_second_pass_leaves_w(tmp_path: Any):
    calls: list[Any] = []

    class Fails(SAMTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == 4:
                raise MemoryError
            return super().compute_loss(*args, **kwargs)

    model = language_model()
    with pytest.raises(MemoryError):
        train(tmp_path, model, cls=Fails, gradient_accumulation_steps=2)
    assert furthest(model, language_model()) == 0.0


def test_inputs_are_prepared_once_and_may_be_changed(tmp_path: Any):
    drawn: list[float] = []

    class Prepares(transformers.Trainer):
        _get_train_sampler = SAMTrainer._get_train_sampler

        def _prepare_inputs(self, inputs: Any) -> Any:
            return {**super()._prepare_inputs(inputs), "drawn": torch.rand(1)}

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            drawn.append(float(inputs.pop("drawn")))
            return super().compute_loss(model, inputs, *args, **kwargs)

    class WithSAM(trainer_runs.SAMTrainerMixin, Prepares):
        pass

    model, plain = language_model(), language_model()
    train(tmp_path, model, cls=WithSAM, gradient_accumulation_steps=2, num_train_epochs=1)
    plain_run(plain, 2, epochs=1)
    assert furthest(model, plain) < CLOSE
    assert [drawn[i] for i in (0, 1)] == [drawn[i] for i in (2, 3)]
    assert len(drawn) == 14
    assert len(set(drawn)) == 7


def test_a_retry_with_smaller_batches_begins_anew(tmp_path: Any):
    class RunsOut(SAMTrainer):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 2:  # half-way through the first window
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(*args, **kwargs)

    model, plain = language_model(), language_model()
    options = {"auto_find_batch_size": True, "gradient_accumulation_steps": 2}
    trainer = train(tmp_path, model, cls=RunsOut, **options)
    assert trainer._train_batch_size == 1
    plain_run(plain, 2, made=batches(size=1))
    assert furthest(model, plain) < CLOSE


def test_a_step_that_runs_out_of_memory_is_given_up(tmp_path: Any):
    """Between the passes, as where the base optimizer makes its state."""

    class RunsOut(transformers.TrainerCallback):
        calls = 0

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("CUDA out of memory.")

    model, plain = language_model(), language_model()
    args = trainer_runs.arguments(tmp_path, auto_find_batch_size=True, gradient_accumulation_steps=2)
    SAMTrainer(model=model, args=args, train_dataset=text(), sam_rho=RHO, callbacks=[RunsOut()]).train()
    plain_run(plain, 2, made=batches(size=1))
    assert furthest(model, plain) < CLOSE


@pytest.mark.guarantee(id="framework-logs")
def test_trl_counts_tokens_and_metrics_once(tmp_path: Any):
    trl = pytest.importorskip("trl")
    counted = {}
    for name, bases in (("sam", (SAMTrainer, trl.SFTTrainer)), ("plain", (trl.SFTTrainer,))):
        if name == "sam":
            bases = (trainer_runs.SAMTrainerMixin, trl.SFTTrainer)
        cls = type("Tuned", bases, {})
        quiet = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
        args = trl.SFTConfig(str(tmp_path), **quiet, max_steps=3, per_device_train_batch_size=2, learning_rate=0.0,
                             bf16=False, gradient_checkpointing=False, gradient_accumulation_steps=2)  # fmt: skip
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in text()])
        trainer = cls(
            model=language_model(dtype=torch.float32), args=args, train_dataset=rows, processing_class=tokenizer()
        )
        trainer.train()
        counted[name] = [logged(trainer, key) for key in ("num_tokens", "mean_token_accuracy", "loss")]
    assert counted["sam"] == counted["plain"]


def test_what_leaves_no_place_for_a_second_pass_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    trainer = SAMTrainer(model=language_model(), args=trainer_runs.arguments(tmp_path), train_dataset=text())
    monkeypatch.setattr(trainer.args, "optim", "galore_adamw_layerwise")
    with pytest.raises(ValueError, match="galore_adamw_layerwise"):
        trainer.create_optimizer()
    for attribute, name in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP1")):
        trainer = SAMTrainer(model=language_model(), args=trainer_runs.arguments(tmp_path), train_dataset=text())
        monkeypatch.setattr(trainer, attribute, True)
        monkeypatch.setitem(vars(trainer.accelerator.state), "fsdp_plugin", SimpleNamespace(fsdp_version=1))
        with pytest.raises(ValueError, match=name):
            trainer.create_optimizer()


def test_a_sam_in_a_trainer_without_the_mixin_is_an_error(tmp_path: Any):
    model = language_model()
    own = SAM(model.parameters(), torch.optim.AdamW, rho=RHO)
    args = trainer_runs.arguments(tmp_path)
    with pytest.raises(RuntimeError, match="SAMTrainerMixin"):
        transformers.Trainer(model=model, args=args, train_dataset=text(), optimizers=(own, None)).train()
