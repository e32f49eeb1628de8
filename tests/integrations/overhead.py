"""CPU time of a step with SAMCallback and SAMTrainerMixin, over that of the same Trainer with both passes by hand.

OMP_NUM_THREADS=1 taskset -c 0 python tests/integrations/overhead.py [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from typing import Any

import environment  # noqa: F401
import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor, nn

from sam_fast import SAM, TrainStep, unwrap
from sam_fast.integrations.lightning import SAMCallback
from sam_fast.integrations.transformers import SAMTrainerMixin

STEPS, WARM, WIDTH, ROWS = 40, 5, 768, 64  # some 30 ms
BEGINS: list[float] = []


class Automatic(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))

    def forward(self, x: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"loss": self.net(x).square().mean()}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        BEGINS.append(time.process_time())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch)["loss"]

    def configure_optimizers(self) -> Any:
        return SAM(self.parameters(), torch.optim.SGD, lr=1e-3)


class Manual(Automatic):
    automatic_optimization = False

    def on_train_start(self) -> None:
        optimizer = self.optimizers()
        self.step = TrainStep(self, optimizer, lambda self, x: self(x)["loss"], backward=self.manual_backward)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.step(batch)


def with_lightning(by_hand: bool) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [] if by_hand else [SAMCallback()]
    trainer = pl.Trainer(max_steps=STEPS, callbacks=callbacks, enable_checkpointing=False, **quiet)
    batches = torch.utils.data.DataLoader([torch.randn(ROWS, WIDTH)] * STEPS, batch_size=None)
    trainer.fit(Manual() if by_hand else Automatic(), batches)


class Notes(transformers.TrainerCallback):
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        BEGINS.append(time.process_time())


class ByHand(transformers.Trainer):
    def training_step(self, model: Any, *args: Any) -> Tensor:
        loss, sam = super().training_step(model, *args), unwrap(self.optimizer)
        sam.first_step(zero_grad=True)
        with sam.second_pass(model):
            super().training_step(model, *args)
        return loss


class WithMixin(SAMTrainerMixin, transformers.Trainer): ...


def with_transformers(by_hand: bool) -> None:
    options = {"max_steps": STEPS, "per_device_train_batch_size": ROWS, "use_cpu": True}
    options |= {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    rows = [{"x": x} for x in torch.randn(ROWS * STEPS, WIDTH)]
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(folder, **options)
        model = Automatic()
        kept = {"train_dataset": rows, "callbacks": [Notes()], "optimizers": (model.configure_optimizers(), None)}
        (ByHand if by_hand else WithMixin)(model, args, **kept).train()


for run in (with_lightning, with_transformers):
    found: dict[bool, list[float]] = {False: [], True: []}
    for by_hand in [False, True, True, False] * int(sys.argv[1] if len(sys.argv) > 1 else 5):
        BEGINS.clear()
        run(by_hand)
        found[by_hand].append(statistics.median(b - a for a, b in zip(BEGINS[WARM:], BEGINS[WARM + 1 :], strict=False)))
    for name, f in (("median", statistics.median), ("fastest", min)):
        ours, hand = 1e3 * f(found[False]), 1e3 * f(found[True])
        print(f"{run.__name__}, {name} round: {ours:.2f} ms, by hand {hand:.2f} ms, ratio {ours / hand:.4f}")
