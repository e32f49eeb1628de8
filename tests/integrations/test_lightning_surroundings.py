"""SAMCallback: validation, checkpoints, exceptions, refusals, several processes; and SAM without it."""

from __future__ import annotations

import contextlib
from typing import Any

import oracle
import pytest
import torch
from lightning_runs import CLOSE, LR, RHO, Module, Values, fit, half_precision, loader, pl, plain_run, trainer
from oracle import batches, furthest, plain_step, small_net, windows
from plain_sam import PlainSAM
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sam_fast import Schedule
from sam_fast.integrations.lightning import SAMCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


# ---- Around the steps ------------------------------------------------------------------------------------------------


def test_validation_in_a_window_sees_w():
    module = Module()
    made = trainer(SAMCallback(), accumulate_grad_batches=4, max_epochs=1, val_check_interval=3, num_sanity_val_steps=0)
    made.fit(module, loader(), loader(4))
    model = small_net()
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    plain_step(model, sam, batches()[:4], oracle.cross_entropy, 4)
    with torch.no_grad():
        for batch in batches()[4:6]:
            model(batch[0])
    assert furthest(module.validated, model) < CLOSE  # after batch 6, half-way through the second window
    assert furthest(module.net, plain_run(1, accumulate=4)[0]) < CLOSE


def test_a_resumed_run_has_the_same_bits(tmp_path: Any):
    """From the middle of an epoch, dropout included."""

    class Seeded(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            torch.manual_seed(self.global_step)

    class Stateful(DataLoader):  # type: ignore[type-arg]
        """As torchdata's: Lightning saves and loads where it stands."""

        position = begin = 0

        def __iter__(self) -> Any:
            begin, self.begin = self.begin, 0
            for number, batch in enumerate(super().__iter__()):
                if number >= begin:
                    self.position = number + 1
                    yield batch

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.begin = state["position"]

    def stateful() -> Stateful:
        return Stateful(TensorDataset(*oracle.data()), batch_size=4)

    def module() -> Seeded:
        return Seeded(0.5, schedule=Schedule(every=2))

    saved = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    whole = module()
    options = {"enable_checkpointing": True, "accumulate_grad_batches": 2, "max_epochs": 3}
    trainer(SAMCallback(), saved, **options).fit(whole, stateful())
    path = next(p for p in tmp_path.iterdir() if "step=6" in p.name)  # two batches of the second epoch are left
    resumed = module()
    trainer(SAMCallback(), **{**options, "enable_checkpointing": False}).fit(resumed, stateful(), ckpt_path=path)
    assert all(
        a.equal(b) for a, b in zip(whole.net.state_dict().values(), resumed.net.state_dict().values(), strict=True)
    )


def test_a_schedule_among_the_hyperparameters(tmp_path: Any):
    """Lightning puts it into checkpoints, which it loads with weights_only=True, and its loggers into a YAML file."""

    class Saved(Module):
        def __init__(self, schedule: Schedule):
            super().__init__(schedule=schedule)
            self.save_hyperparameters()

    logger = pl.loggers.CSVLogger(tmp_path)
    made = trainer(SAMCallback(), max_epochs=1, logger=logger)
    made.fit(Saved(Schedule(start=0.5, total=8)), loader())
    made.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Saved.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.hparams.schedule == Schedule(start=0.5, total=8)


def test_an_average_of_the_weights_sees_w():
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = Module()
    averaging = EMAWeightAveraging(decay=0.5)
    fit_with = trainer(SAMCallback(), averaging, max_epochs=1)
    fit_with.fit(module, loader())
    model = small_net()
    average: list[Tensor] = []
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    for batch in batches():
        plain_step(model, sam, [batch], oracle.cross_entropy, 1)
        latest = [p.detach().clone() for p in model.parameters()]
        average = (
            [0.5 * a + 0.5 * p for a, p in zip(average, latest, strict=True)] if average else latest
        )  # it begins there
    first = [p.detach().clone() for p in small_net().parameters()]
    assert max(float((a - p).abs().max()) for a, p in zip(average, first, strict=True)) > 1e-3
    found = list(module.net.parameters())  # Lightning puts the average into the module at the end
    assert max(float((a - p).detach().abs().max()) for a, p in zip(average, found, strict=True)) < 1e-7


@pytest.mark.parametrize("ascent", [1.0, 0.5])
def test_stochastic_weight_averaging_sees_w(ascent: float):
    """Lightning averages what epochs begin with, then has one more epoch for the statistics, on whole batches."""
    averaging = pl.callbacks.StochasticWeightAveraging(LR, swa_epoch_start=2, annealing_epochs=1)
    module = Module()
    trainer(SAMCallback(ascent), averaging, max_epochs=3).fit(module, loader())
    begins = [plain_run(epochs, ascent=round(1 / ascent))[0] for epochs in (1, 2)]
    average = small_net()
    with torch.no_grad():
        for p, first, second in zip(average.parameters(), *(m.parameters() for m in begins), strict=True):
            p.copy_((first + second) / 2)
    torch.optim.swa_utils.update_bn([x for x, _ in batches()], average)
    assert furthest(module.net, average) < CLOSE


def test_an_exception_leaves_w(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls.append(batch_idx)
            if len(calls) == 6:  # a second pass
                raise MemoryError
            return super().training_step(batch, batch_idx)

    module, callback = Fails(), SAMCallback()
    with pytest.raises(MemoryError):
        fit(module, callback)
    model = small_net()
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    for batch in batches()[:2]:
        plain_step(model, sam, [batch], oracle.cross_entropy, 1)
    model(batches()[2][0])
    assert furthest(module.net, model) < CLOSE
    assert type(module).log is pl.LightningModule.log
    assert "log" not in vars(module)
    fit(module, callback, max_epochs=1)  # the callback can be used again


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_checkpoint_in_mid_step_holds_w(backend: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    """As Lightning's handler of SLURM's signal saves one, between any two lines; the step goes on."""
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda command: 0)
    monkeypatch.setenv("SLURM_JOB_ID", "1")

    class Signalled(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.trainer.optimizers[0].perturbed:
                self.trainer._signal_connector._slurm_sigusr_handler_fn(0, None)
            return loss

    finalized: list[str] = []
    module, logger = Signalled(backend=backend), Values()
    logger.finalize = finalized.append
    fit(module, max_epochs=1, default_root_dir=tmp_path, logger=logger)
    assert finalized == ["finished"] * 7 + ["success"]
    model = small_net()
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    for number, batch in enumerate(batches(), 1):
        state = torch.load(tmp_path / f"hpc_ckpt_{number}.ckpt", weights_only=False)["state_dict"]
        for name, p in model.named_parameters():
            assert (state[f"net.{name}"] - p).abs().max() < CLOSE
        plain_step(model, sam, [batch], oracle.cross_entropy, 1)
    assert furthest(module.net, model) < CLOSE


def test_a_hook_that_raises_between_the_passes_leaves_w():
    class Fails(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert optimizer.perturbed
            raise MemoryError

    module = Fails(dtype=torch.float32)
    made = trainer(SAMCallback(), plugins=[half_precision(2.0)])  # here the scaler calls the hook, not SAM
    with pytest.raises(MemoryError):
        made.fit(module, loader(dtype=torch.float32))
    assert all(p.equal(q) for p, q in zip(module.net.parameters(), small_net(torch.float32).parameters(), strict=True))


def test_batches_whose_gradients_are_thrown_away_take_no_part():
    class EverySecond(Module):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    module = EverySecond()
    fit(module, max_epochs=1)
    model = small_net()
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9)
    for number, batch in enumerate(batches()):
        if number % 2:
            plain_step(model, sam, [batch], oracle.cross_entropy, 1)
        else:
            model(batch[0])
    assert furthest(module.net, model) < CLOSE


# ---- What is refused, and what works without the callback ------------------------------------------------------------


def test_refusals():
    class Manual(Module):
        automatic_optimization = False

    class Plain(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=LR)

    class Fetches(Module):
        def training_step(self, dataloader_iter: Any) -> None: ...  # type: ignore[override]

    for module, text in [
        (Manual(), "opt.first_step"),
        (Plain(), r"SAM\(self.parameters"),
        (Fetches(), "batch_idx"),
    ]:
        with pytest.raises(ValueError, match=text):
            fit(module)
    with pytest.raises(ValueError, match="two SAMCallbacks"):
        trainer(SAMCallback(), SAMCallback()).fit(Module(), loader())
    with pytest.raises(ValueError, match="ascent=1"):
        SAMCallback(ascent=0.5, replay_rng=True)


def test_fsdp1_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.distributed.fsdp.FullyShardedDataParallel", nn.Identity)
    module = Module()
    module.part = nn.Identity()
    with pytest.raises(ValueError, match="FSDP2"):
        fit(module)


def test_clipping_in_float16_is_an_error_of_lightnings():
    made = trainer(SAMCallback(), plugins=[half_precision(2.0)], gradient_clip_val=0.1)
    with pytest.raises(RuntimeError, match="gradient clipping"):
        made.fit(Module(dtype=torch.float32), loader(dtype=torch.float32))


def test_strategies_with_an_engine_are_refused():
    made = trainer(SAMCallback())

    class DeepSpeedStrategy(type(made.strategy)):  # type: ignore[misc]
        handles_gradient_accumulation = True

    made.strategy.__class__ = DeepSpeedStrategy
    with pytest.raises(ValueError, match="DeepSpeedStrategy"):
        made.fit(Module(), loader())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_learning_rate_finder_runs_without_callbacks(accumulate: int, tmp_path: Any):
    """And leaves training as it would have been."""
    from lightning.pytorch.tuner import Tuner

    module = Module()
    made = trainer(SAMCallback(), accumulate_grad_batches=accumulate, default_root_dir=tmp_path)
    expected = contextlib.nullcontext() if accumulate == 1 else pytest.raises(RuntimeError, match="LearningRateFinder")
    with expected:
        Tuner(made).lr_find(module, loader(), num_training=4, update_attr=False)
    if accumulate == 1:
        made.fit(module, loader())
        assert furthest(module.net, plain_run()[0]) < CLOSE


@pytest.mark.filterwarnings("default")
def test_automatic_optimization_without_the_callback():
    """The weights are right; a warning says that the logs are not. Accumulation is an error."""
    module = Module()
    with pytest.warns(UserWarning, match="SAMCallback"):
        trainer().fit(module, loader())
    assert furthest(module.net, plain_run()[0]) < CLOSE
    with pytest.raises(RuntimeError, match="SAMCallback"):
        trainer(accumulate_grad_batches=2).fit(Module(), loader())


# ---- Two processes ---------------------------------------------------------------------------------------------------


class Shard(Module):
    """Every process trains with its own rows; BatchNorm statistics are rank 0's."""

    def train_dataloader(self) -> Any:
        rows = TensorDataset(*oracle.data(24))
        return DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows, shuffle=False))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ddp(accumulate: int, tmp_path: Any):
    module = Shard()
    options = {"devices": 2, "strategy": "ddp_fork", "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.2}
    trainer(SAMCallback(), **options, max_epochs=2, use_distributed_sampler=False).fit(module)

    class Pair(nn.Module):
        """Both processes: a batch is a pair, each half with its own BatchNorm."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.other = small_net(), small_net()
            for name, p in self.net.named_parameters():
                parent, _, last = name.rpartition(".")
                self.other.get_submodule(parent)._parameters[last] = p

    pair = Pair()
    sam = PlainSAM(pair.net.parameters(), rho=RHO, lr=LR, momentum=0.9)

    def loss_fn(pair: Any, batch: Any) -> Tensor:
        for a, b in zip(pair.net.buffers(), pair.other.buffers(), strict=True):
            b.copy_(a)  # DDP sends rank 0's before each forward pass
        return (oracle.cross_entropy(pair.net, batch[0]) + oracle.cross_entropy(pair.other, batch[1])) / 2

    shards = batches(24)
    pairs = list(zip(shards_of(shards, 0), shards_of(shards, 1), strict=True))
    for _ in range(2):
        for window in windows(pairs, accumulate):
            plain_step(pair, sam, window, loss_fn, accumulate, clip=0.2)
    assert furthest(module.net, pair.net) < CLOSE


def shards_of(all_batches: list[Any], rank: int) -> list[Any]:
    """What a DistributedSampler gives a process: every second row."""
    x, y = torch.cat([b[0] for b in all_batches])[rank::2], torch.cat([b[1] for b in all_batches])[rank::2]
    return list(zip(x.split(4), y.split(4), strict=True))
