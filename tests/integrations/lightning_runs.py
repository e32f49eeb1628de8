"""A module that notes what happens to it, and a quiet Trainer, for the tests of Lightning."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from oracle import batches, plain_step, small_net, windows
from plain_sam import PlainSAM
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sam_fast import SAM

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: make test-integrations")
torchmetrics = pytest.importorskip("torchmetrics")

from sam_fast.integrations.lightning import SAMCallback  # noqa: E402

RHO, LR, CLOSE = 0.3, 0.1, 1e-12


class Module(pl.LightningModule):
    """A classifier that notes which hooks run, and logs."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64, base: Any = None, **options: Any):
        super().__init__()
        self.net = small_net(dtype, dropout)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.options = {"rho": RHO, **options}
        self.seen: list[str] = []
        self.logged: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self.net(x)
        loss = nn.functional.cross_entropy(out, y)
        self.accuracy(out, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        if self.logger is not None:
            self.logger.log_metrics({"own": float(loss.detach())}, self.global_step)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append("validation")
        self.validated = oracle.state_of(self.net)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append("before_step")

    def on_after_backward(self) -> None:
        self.seen.append("after_backward")

    def configure_optimizers(self) -> Any:
        return SAM(self.parameters(), torch.optim.SGD, lr=LR, momentum=0.9, **self.options)


class Values(pl.loggers.logger.Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    name = version = "values"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def loader(rows: int = 28, dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*oracle.data(rows, dtype)), batch_size=4)


def trainer(*callbacks: Any, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "log_every_n_steps": 1}
    return pl.Trainer(**{**defaults, **quiet, **options}, callbacks=list(callbacks))


def fit(module: Module, callback: SAMCallback | None = None, rows: int = 28, **options: Any) -> Any:
    made = trainer(callback or SAMCallback(), **options)
    made.fit(module, loader(rows), options.pop("val", None))
    return made


def plain_run(
    epochs: int = 2, accumulate: int = 1, rows: int = 28, ascent: int = 1, **options: Any
) -> tuple[nn.Module, oracle.Record]:
    model, record = small_net(), oracle.Record()
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    for _ in range(epochs):
        for window in windows(batches(rows), accumulate):
            plain_step(
                model, sam, window, oracle.cross_entropy, accumulate, record=record,
                first=lambda batch: tuple(t[::ascent] for t in batch), **options,
            )  # fmt: skip
    return model, record


def half_precision(scale: float) -> Any:
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)
