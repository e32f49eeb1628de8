"""Lightning's manual optimization, where each pass is written out and there may be several optimizers."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from lightning_runs import CLOSE, LR, RHO, Module, half_precision, loader, plain_run, trainer
from oracle import batches, furthest, plain_step, small_net
from plain_sam import PlainSAM
from torch import Tensor, nn

from sam_fast import SAM, unwrap
from sam_fast.integrations.lightning import SAMCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Manual(Module):
    automatic_optimization = False

    def loss(self, batch: Any) -> Tensor:
        return oracle.cross_entropy(self.net, batch)

    def both_passes(self, optimizer: Any, batch: Any) -> None:
        self.manual_backward(self.loss(batch))
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(self):
            self.manual_backward(self.loss(batch))
        optimizer.second_step(zero_grad=True)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.both_passes(self.optimizers(), batch)


def test_training():
    module, made = Manual(), trainer()
    made.fit(module, loader())
    assert furthest(module.net, plain_run()[0]) < CLOSE
    assert made.global_step == 14
    assert module.seen.count("before_step") == 14


def test_float16_with_a_scaler():
    plugin = half_precision(2.0**10)
    module = Manual(dtype=torch.float32)
    trainer(plugins=[plugin]).fit(module, loader(dtype=torch.float32))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return oracle.cross_entropy(model, batch)

    model = small_net(torch.float32)
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    for batch in batches(dtype=torch.float32) * 2:
        plain_step(model, sam, [batch], loss_fn, 1)
    assert plugin.scaler.get_scale() == 2.0**10  # no step was skipped
    assert furthest(module.net, model) < 2e-3  # gradients of another scale are rounded to float16 otherwise


class Two(Manual):
    """A second network behind the first, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, dtype=torch.float64)

    def loss(self, batch: Any) -> Tensor:
        return oracle.cross_entropy(nn.Sequential(self.net, self.head), batch)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            self.both_passes(optimizer, batch)
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        options = {"base_optimizer": torch.optim.SGD, "rho": RHO, "lr": LR}
        return [SAM(part.parameters(), **options) for part in (self.net, self.head)]


def test_several_optimizers_and_toggle_optimizer():
    torch.manual_seed(3)
    module, made = Two(), trainer()
    model = nn.Sequential(small_net(), nn.Linear(3, 3, dtype=torch.float64))
    model[1].load_state_dict(module.head.state_dict())
    made.fit(module, loader())
    sams = [PlainSAM(part.parameters(), rho=RHO, lr=LR) for part in model]
    for batch in batches() * 2:
        for part, sam in zip(model, sams, strict=True):
            model.requires_grad_(False)
            part.requires_grad_(True)
            plain_step(model, sam, [batch], oracle.cross_entropy, 1)
    assert furthest(module.net, model[0]) < CLOSE
    assert furthest(module.head, model[1]) < CLOSE
    assert made.global_step == 28
    with pytest.raises(TypeError, match="2 of them"):
        unwrap(module.optimizers())


def test_several_optimizers_in_automatic_optimization_are_an_error_of_lightnings():
    class Automatic(Two):
        automatic_optimization = True

    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        trainer(SAMCallback()).fit(Automatic(), loader())


def test_first_step_left_out_is_an_error():
    class OnePass(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.manual_backward(self.loss(batch))
            self.optimizers().step()

    for plugins in ([], [half_precision(2.0)]):
        module = OnePass(dtype=torch.float32)
        with pytest.raises(RuntimeError, match=r"first_step\("):
            trainer(plugins=plugins).fit(module, loader(dtype=torch.float32))
