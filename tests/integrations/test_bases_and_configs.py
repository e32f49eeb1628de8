"""Base optimizers with quantised state, configuration files, Optuna, and what Ray sends."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from oracle import batches, furthest, plain_step, small_net
from plain_sam import PlainSAM
from recipes import framework, recipes, run
from torch import nn

from sam_fast import SAM, Schedule, TrainStep

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


# ---- Quantised state -------------------------------------------------------------------------------------------------


def wide_net() -> nn.Sequential:
    """With a weight of 6144 elements: smaller ones than 4096 keep their state as it is."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 1024), nn.Tanh(), nn.Linear(1024, 3))


def check_against_a_plain_loop(base: Any, quantised: Any) -> None:
    """The same state, the same bits; a checkpoint in the middle goes on alike."""
    model, plain = wide_net(), wide_net()
    optimizer, sam = SAM(model.parameters(), base, lr=1e-3), PlainSAM(plain.parameters(), base, lr=1e-3)
    step = TrainStep(model, optimizer, oracle.cross_entropy)
    for number, batch in enumerate(batches(dtype=torch.float32)):
        if number == 3:
            optimizer.load_state_dict(optimizer.state_dict())
        step(batch)
        plain_step(plain, sam, [batch], oracle.cross_entropy, 1)
    assert quantised(optimizer.state[model[0].weight])
    assert optimizer.second_step_path != "fused"
    assert furthest(model, plain) == 0.0
    assert furthest(model, wide_net()) > 1e-3


def test_torchao(monkeypatch: pytest.MonkeyPatch):
    """Its step is compiled, which is left out here: it takes 20 seconds."""
    torchao = framework("torchao")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    check_against_a_plain_loop(
        torchao.optim.AdamW8bit, lambda state: type(state["exp_avg"]).__name__ == "OptimState8bit"
    )


def test_bitsandbytes():
    bitsandbytes = framework("bitsandbytes")
    check_against_a_plain_loop(bitsandbytes.optim.AdamW8bit, lambda state: state["state1"].dtype == torch.uint8)


# ---- Configurations --------------------------------------------------------------------------------------------------


def test_lightning_cli(tmp_path: Path):
    """The options of the base optimizer and the schedule by class paths, for LightningCLI's own optimizer and for one
    that the module is given."""
    framework("jsonargparse")
    from lightning.pytorch.cli import LightningCLI, OptimizerCallable
    from lightning_runs import pl

    class Bare(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

    class Configured(Bare):
        def __init__(self, optimizer: Any) -> None:
            super().__init__()
            self.make = optimizer

        def configure_optimizers(self) -> Any:
            return self.make(self.parameters())

    Configured.__init__.__annotations__["optimizer"] = OptimizerCallable  # as text it would not be found

    (config,) = recipes("LightningCLI", "yaml")
    nested = "model:\n" + "".join(f"  {line}" for line in config.split("trainer:")[0].splitlines(keepends=True))
    nested += "trainer:" + config.split("trainer:")[1]
    for cls, text in ((Bare, config), (Configured, nested)):
        (tmp_path / "config.yaml").write_text(text)
        cli = LightningCLI(
            cls, args=["--config", str(tmp_path / "config.yaml")], run=False, save_config_callback=None,
            auto_configure_optimizers=cls is Bare,
            trainer_defaults={"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        )  # fmt: skip
        optimizer = cli.model.configure_optimizers()
        assert type(optimizer) is SAM
        assert type(optimizer.base_optimizer) is torch.optim.SGD
        assert {name: optimizer.defaults[name] for name in ("rho", "lr", "momentum")} == {
            "rho": 0.1, "lr": 0.01, "momentum": 0.9
        }  # fmt: skip
        assert optimizer._schedule == Schedule(every=2)
        assert any(type(callback).__name__ == "SAMCallback" for callback in cli.trainer.callbacks)


def test_options_of_the_base_optimizer_among_sams_are_an_error_of_lightning_clis(tmp_path: Path, capsys: Any):
    framework("jsonargparse")
    from lightning.pytorch.cli import LightningCLI
    from lightning_runs import Module

    text = "optimizer: {class_path: sam_fast.SAM, init_args: {base_optimizer: torch.optim.SGD, lr: 0.1}}"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit):
        LightningCLI(Module, args=["--config", str(tmp_path / "config.yaml")], run=False, save_config_callback=None)
    assert "'lr' is not accepted" in capsys.readouterr().err


# ---- Searches --------------------------------------------------------------------------------------------------------


def trained_loss(rho: float) -> float:
    """A plain run's loss."""
    model = small_net()
    sam = PlainSAM(model.parameters(), rho=rho, lr=0.1)
    for batch in batches():
        plain_step(model, sam, [batch], oracle.cross_entropy, 1)
    with torch.no_grad():
        return float(oracle.cross_entropy(model, oracle.data()))


def test_optuna():
    optuna = framework("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = {"make_model": small_net, "loader": batches(), "loss_fn": oracle.cross_entropy, "validate": validate}
    study = run("Optuna", optuna=optuna, **names)["study"]
    assert len(study.trials) == 4
    assert len({trial.params["rho"] for trial in study.trials}) == 4
    for trial in study.trials:
        assert trial.value == pytest.approx(trained_loss(trial.params["rho"]), rel=1e-9)


def validate(model: nn.Module) -> float:
    with torch.no_grad():
        return float(oracle.cross_entropy(model, oracle.data()))


def test_what_ray_sends_arrives():
    """Functions and what they hold, by value."""
    cloudpickle = framework("cloudpickle")

    def train(rho: float, optimizer_class: Any = SAM) -> float:
        model = small_net()
        step = TrainStep(model, optimizer_class(model.parameters(), rho=rho, lr=0.1), oracle.cross_entropy)
        for batch in batches():
            step(batch)
        return validate(model)

    sent = cloudpickle.loads(cloudpickle.dumps(partial(train, rho=0.3)))
    assert sent() == pytest.approx(trained_loss(0.3), rel=1e-9)

    model, plain = small_net(), small_net()
    step = TrainStep(model, SAM(model.parameters(), rho=0.05, lr=0.1, momentum=0.9), oracle.cross_entropy)
    sam = PlainSAM(plain.parameters(), rho=0.05, lr=0.1, momentum=0.9)
    for number, batch in enumerate(batches()):
        if number == 3:
            step = cloudpickle.loads(cloudpickle.dumps(step))
        step(batch)
        plain_step(plain, sam, [batch], oracle.cross_entropy, 1)
    assert furthest(step.model, plain) < 1e-12
