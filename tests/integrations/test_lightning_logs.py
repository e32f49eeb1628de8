"""Lightning: what counts once although both passes run: logs, metrics, numbers, and what training_step collects."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import lightning_runs
import numpy
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
    plain_run,
    torchmetrics,
)
from oracle import batches, furthest, plain_step, small_net, windows
from plain_sam import PlainSAM
from torch import Tensor, nn

from sam_fast import SAM, frozen_running_stats

CSVLogger = lightning_runs.pl.loggers.CSVLogger

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.guarantee(id="framework-logs")
def test_what_is_logged_is_the_first_passs():
    module, logger = Module(), Values()
    fit(module, logger=logger, max_epochs=1)
    model, record = plain_run(epochs=1)
    assert logger.of("loss_step") == pytest.approx(record.losses, rel=1e-6)
    assert logger.of("own") == pytest.approx(record.losses, rel=1e-6)
    assert logger.of("loss_epoch") == pytest.approx([sum(record.losses) / 7], rel=1e-6)
    model = small_net()
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    right = 0
    for x, y in batches():
        with torch.no_grad(), frozen_running_stats(model):
            right += int((model(x).argmax(1) == y).sum())
        plain_step(model, sam, [(x, y)], oracle.cross_entropy, 1)
    assert logger.of("accuracy") == pytest.approx([right / 28])


def test_a_log_that_was_passed_on_logs_the_first_passs():
    """As to a loss that logs its parts."""

    class PassesOn(Module):
        def __init__(self) -> None:
            super().__init__()
            self.report = partial(self.log, on_step=True, on_epoch=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.report("reported", loss)
            return loss

    logger = Values()
    fit(PassesOn(), logger=logger, max_epochs=2)
    assert logger.of("reported_step") == logger.of("loss_step")
    assert logger.of("reported_epoch") == logger.of("loss_epoch")


def test_a_logger_has_its_paths_in_both_passes(tmp_path: Path):
    """Where a training_step saves images, as Lightning's page says."""
    kept: list[Any] = []

    class Logger(CSVLogger):
        def log_image(self, image: Any) -> None:
            kept.append(image)

    class Saves(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logger = self.trainer.loggers[0]
            logger.log_image(batch_idx)
            logger.experiment.log_metrics({"x": 1.0}, 0)
            assert isinstance(logger, Logger)
            paths.append((self.trainer.log_dir, logger.log_dir, logger.save_dir, logger.root_dir))
            names.append((logger.name, logger.version))
            return super().training_step(batch, batch_idx)

    paths, names = [], []
    fit(Saves(), max_epochs=1, logger=Logger(tmp_path, name="run", version=0))
    assert kept == list(range(7))
    folder = str(tmp_path / "run" / "version_0")
    assert paths == [(folder, folder, str(tmp_path), str(tmp_path / "run"))] * 14
    assert names == [("run", 0)] * 14
    rows = (Path(folder) / "metrics.csv").read_text().splitlines()
    assert len([row for row in csv.DictReader(rows) if row["x"]]) == 7


def test_a_metric_with_tensors_that_are_no_states_counts_once():
    class Extremes(Module):
        def __init__(self) -> None:
            super().__init__()
            self.extremes = torchmetrics.MinMaxMetric(torchmetrics.MeanMetric())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.extremes._base_metric.reset()
            self.extremes(loss.detach())
            return loss

    module = Extremes()
    fit(module, max_epochs=1)
    losses = plain_run(epochs=1)[1].losses
    found = [float(module.extremes.min_val), float(module.extremes.max_val)]
    assert found == pytest.approx([min(losses), max(losses)], rel=1e-6)


def test_a_metric_that_counts_its_values_counts_them_once():
    class Running(Module):
        def __init__(self) -> None:
            super().__init__()
            self.running = torchmetrics.aggregation.RunningMean(2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.running(loss.detach())
            return loss

    module = Running()
    fit(module, max_epochs=1)
    assert float(module.running.compute()) == pytest.approx(sum(plain_run(epochs=1)[1].losses[-2:]) / 2, rel=1e-6)


def test_numbers_of_the_module_are_the_same_in_both_passes_and_count_once():
    class Anneals(Module):
        weight = numpy.float64(0.5)

        def __init__(self) -> None:
            super().__init__()
            self.uses, self.kept, self.begun = 0, None, None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.uses += 1
            self.weight = self.weight + 0.25  # which is the class's at first
            if self.begun is None:  # what is made once is not made again at w + e
                self.begun, self.copied = self.uses, self.net[0].weight.detach().clone()
            self.kept = [self.uses] if self.kept is None else self.kept
            return self.weight * self.uses * super().training_step(batch, batch_idx)

    module = Anneals()
    fit(module, max_epochs=1, accumulate_grad_batches=2)
    assert (module.uses, module.weight, module.begun, module.kept) == (7, 2.25, 1, [1])
    assert module.copied.equal(small_net()[0].weight)
    made = batches()
    model, factors = small_net(), {id(batch): (0.75 + number / 4) * (number + 1) for number, batch in enumerate(made)}
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    for window in windows(made, 2):
        plain_step(model, sam, window, lambda model, batch: factors[id(batch)] * oracle.cross_entropy(model, batch), 2)
    assert furthest(module.net, model) < CLOSE


@pytest.mark.parametrize("kept", ["a leaf", "an alias"])
def test_a_weight_that_is_a_number_is_perturbed_whoever_keeps_its_memory(kept: str):
    class Learns(Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.ones(1, dtype=torch.float64)
            self.temperature = nn.Parameter(weight) if kept == "an alias" else weight.requires_grad_()

        def configure_optimizers(self) -> Any:
            return SAM([*self.net.parameters(), self.temperature], lr=LR, rho=RHO)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            found.append(self.temperature.item())
            self.last = self.temperature.detach() if kept == "an alias" else None
            return nn.functional.cross_entropy(self.net(batch[0]) * self.temperature, batch[1])

    found: list[float] = []
    fit(Learns(), max_epochs=1)
    assert all(w != there for w, there in zip(found[::2], found[1::2], strict=True))


@pytest.mark.guarantee(id="framework-logs")
def test_what_training_step_collects_counts_once():
    """In lists, as Lightning's page on on_train_epoch_end says; in tensors; in metrics in a dictionary."""

    class Collects(Module):
        def __init__(self) -> None:
            super().__init__()
            self.losses, self.parts = [], {"train": [], "test": []}
            self.total, self.rows, self.metrics = torch.tensor(0.0), 0, {"loss": torchmetrics.SumMetric()}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.losses.append(float(loss.detach()))
            self.parts["train"] += [float(loss.detach())]
            self.total += loss.detach()  # in place
            self.rows = self.rows + torch.tensor(len(batch[0]))  # an int becomes a tensor
            self.metrics["loss"].update(loss.detach())
            return loss

    module = Collects()
    total = module.total
    fit(module, max_epochs=1, accumulate_grad_batches=2)
    losses, model = [], small_net()
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    for window in windows(batches(), 2):
        with torch.no_grad(), frozen_running_stats(model):
            losses += [float(oracle.cross_entropy(model, batch)) for batch in window]
        plain_step(model, sam, window, oracle.cross_entropy, 2)
    assert module.losses == pytest.approx(losses)
    assert module.parts == {"train": module.losses, "test": []}
    assert module.total is total
    assert [float(total), float(module.metrics["loss"].compute())] == pytest.approx([sum(losses)] * 2)
    assert int(module.rows) == 28
