"""Tiny random models, data and a plain loop for the tests of Transformers' Trainer. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Record, plain_step, windows
from plain_sam import PlainSAM
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

transformers = pytest.importorskip("transformers", reason="Transformers is not installed: make test-integrations")
pytest.importorskip("accelerate")

from sam_fast.integrations.transformers import SAMTrainerMixin  # noqa: E402

RHO, LR, DECAY, CLIP, CLOSE = 0.2, 0.05, 0.1, 0.2, 1e-9


class SAMTrainer(SAMTrainerMixin, transformers.Trainer):
    """Without shuffling."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def language_model(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=19, max_position_embeddings=16, use_cache=False, attention_dropout=dropout
    )
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config).to(dtype)


def text(rows: int = 14, ragged: bool = True) -> list[dict[str, Tensor]]:
    """Rows of 8 tokens; of some only the last few count."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for row in range(rows):
        ids = torch.randint(0, 19, (8,), generator=generator)
        labels = ids.clone()
        labels[: row % 5 if ragged else 0] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def tokenizer() -> Any:
    """A tokenizer whose words are the numbers of the tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {str(number): number for number in range(19)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="2"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="1")


def batches(rows: int = 14, size: int = 2, ragged: bool = True) -> list[dict[str, Tensor]]:
    found = text(rows, ragged)
    parts = [found[i : i + size] for i in range(0, rows, size)]
    return [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in parts]


def arguments(folder: Any, **options: Any) -> Any:
    quiet = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": LR, "weight_decay": DECAY}
    others = {"max_grad_norm": CLIP, "lr_scheduler_type": "linear", "optim": "adamw_torch"}
    return transformers.TrainingArguments(str(folder), **{**quiet, **training, **others, **options})


def train(folder: Any, model: Any, rows: int = 14, cls: Any = SAMTrainer, data: Any = None, **options: Any) -> Any:
    """Train and return the trainer. Options that begin with ``sam_`` are the mixin's."""
    sam = {name: options.pop(name) for name in list(options) if name.startswith("sam_")}
    resume = options.pop("resume_from_checkpoint", None)
    trainer = cls(
        model=model, args=arguments(folder, **options), train_dataset=data or text(rows), **{"sam_rho": RHO, **sam}
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """The Trainer's parameter groups: no weight decay for biases and norms."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    spared = [name for name, _ in named if name.endswith("bias") or "norm" in name.lower()]
    return [
        {"params": [p for name, p in named if name not in spared], "weight_decay": DECAY},
        {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
    ]


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and the token that comes next."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()


def sum_of_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """In float32, as Transformers computes it."""
    logits, labels = logits_of(model, batch)
    return nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


def plain_run(
    model: Any,
    accumulate: int = 1,
    rows: int = 14,
    epochs: int = 2,
    loss_fn: Callable[[nn.Module, Any], Tensor] = sum_of_losses,
    counted: Callable[[Any], float] | None = None,
    made: list[dict[str, Tensor]] | None = None,
    base: Any = torch.optim.AdamW,
    constant: bool = False,
    rho: float = RHO,
) -> Record:
    """Train ``model`` as the Trainer does, with SAM: the loss of a step is the mean over all its tokens."""
    record = Record()
    model.train()
    sam = PlainSAM(groups_of(model), base, rho=rho, lr=LR)
    if hasattr(sam.base, "train"):
        sam.base.train()
    made = batches(rows) if made is None else made
    steps = epochs * -(-len(made) // accumulate)
    schedule = torch.optim.lr_scheduler.LambdaLR(sam.base, lambda step: 1.0 if constant else 1 - step / steps)
    for _ in range(epochs):
        for window in windows(made, accumulate):
            tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
            plain_step(model, sam, window, loss_fn, counted(window) if counted else tokens, CLIP, record)
            schedule.step()
    return record
