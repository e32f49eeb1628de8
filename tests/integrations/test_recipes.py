"""docs/integrations.md: every recipe is executed as it stands there, and compared with a plain loop."""

from __future__ import annotations

import pickle
import re
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from oracle import batches, furthest, plain_step, small_net
from plain_sam import PlainSAM
from recipes import PAGE, framework, recipes, run
from torch import nn

from sam_fast import SAM, Schedule

RHO, LR, CLOSE = 0.05, 0.1, 1e-12

pytestmark = [
    pytest.mark.skipif(not PAGE.is_file(), reason="runs from a checkout"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def plain_run(clip: float | None = None, momentum: float = 0.0) -> nn.Module:
    model = small_net()
    sam = PlainSAM(model.parameters(), rho=RHO, lr=LR, momentum=momentum)
    for batch in batches():
        plain_step(model, sam, [batch], oracle.cross_entropy, 1, clip)
    return model


def test_the_pages_list_of_blocks_is_complete():
    headings = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tested = re.findall(r'(?:run|recipes)\("(\w+)"', tests)
    assert set(headings) == {*tested, "What does not work", "Tests"}


@pytest.mark.parametrize("loop", ["accelerate", "lightning.fabric", "ignite.engine", "fastai.basics"])
def test_step_without_first_step_is_an_error(loop: str):
    """The loop that one would write, or that the framework has, with any other optimizer."""
    made, model = framework(loop), small_net(torch.float32)
    optimizer, data = SAM(model.parameters(), rho=RHO, lr=LR), batches(dtype=torch.float32)

    def by_hand(model: Any, optimizer: Any, backward: Any) -> None:
        backward(oracle.cross_entropy(model, data[0]))
        optimizer.step()

    def accelerate() -> None:
        made.state.AcceleratorState._reset_state(True)
        made.state.GradientState._reset_state()
        accelerator = made.Accelerator(cpu=True)
        by_hand(*accelerator.prepare(model, optimizer), accelerator.backward)

    def fabric() -> None:
        engine = made.Fabric(accelerator="cpu", devices=1)
        by_hand(*engine.setup(model, optimizer), engine.backward)

    def engine() -> None:
        made.create_supervised_trainer(model, optimizer, nn.functional.cross_entropy).run(data)

    def basics() -> None:
        framework("fastai.callback.progress")
        loader = made.DataLoader(list(zip(*oracle.data(dtype=torch.float32), strict=True)), bs=4)
        opt_func = partial(made.OptimWrapper, opt=partial(SAM, rho=RHO))
        learner = made.Learner(made.DataLoaders(loader, loader), model, nn.functional.cross_entropy, opt_func=opt_func)
        with learner.no_bar(), learner.no_logging():
            learner.fit(1, LR)

    with pytest.raises(RuntimeError, match=r"first_step\(\).*docs/integrations.md"):
        locals()[loop.rpartition(".")[2]]()
    assert all(p.equal(q) for p, q in zip(model.parameters(), small_net(torch.float32).parameters(), strict=True))


def test_lightning():
    framework("lightning")
    from lightning_runs import LR as LIGHTNING_LR
    from lightning_runs import Module, loader, pl

    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    module = Module(rho=RHO)
    run("Lightning", Trainer=pl.Trainer, options=options, module=module, loader=loader())
    assert LIGHTNING_LR == LR
    assert furthest(module.net, plain_run(momentum=0.9)) < CLOSE

    training_step = run("Lightning", 1)["training_step"]
    loss = {"loss": lambda self, batch: oracle.cross_entropy(self.net, batch), "automatic_optimization": False}
    manual = type("Manual", (Module,), {"training_step": training_step, **loss})(rho=RHO)
    pl.Trainer(max_epochs=1, **options).fit(manual, loader())
    assert furthest(manual.net, plain_run(momentum=0.9)) < CLOSE


def test_transformers(tmp_path: Path):
    transformers = framework("transformers")
    import trainer_runs

    class Sequential(transformers.Trainer):
        _get_train_sampler = trainer_runs.SAMTrainer._get_train_sampler

    model, plain = trainer_runs.language_model(), trainer_runs.language_model()
    args = trainer_runs.arguments(tmp_path)
    run("Transformers", Trainer=Sequential, model=model, args=args, dataset=trainer_runs.text())
    trainer_runs.plain_run(plain, rho=RHO)
    assert furthest(model, plain) < trainer_runs.CLOSE


def test_accelerate():
    accelerate = framework("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    names = {"accelerator": accelerate.Accelerator(cpu=True), "model": small_net(), "loader": batches()}
    made = run("Accelerate", loss_fn=oracle.cross_entropy, **names)
    assert furthest(made["model"], plain_run(clip=1.0)) < 1e-8


def test_fabric():
    fabric = framework("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    made = run("Fabric", fabric=fabric, model=small_net(), loader=batches(), loss_fn=oracle.cross_entropy)
    assert furthest(made["model"].module, plain_run(clip=1.0)) < 1e-8


def test_timm():
    timm = framework("timm")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": 3}

    def small_vit() -> Any:
        torch.manual_seed(1)
        return timm.models.VisionTransformer(**sizes).double()

    generator = torch.Generator().manual_seed(2)
    loader = [
        (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, number % 3]))
        for number in range(5)
    ]
    made = run("timm", model=small_vit(), loader=loader, loss_fn=oracle.cross_entropy)
    plain = small_vit()
    groups = timm.optim.param_groups_layer_decay(plain, 0.05, plain.no_weight_decay(), layer_decay=0.75)
    for group in groups:
        group["lr"] = 1e-2 * group["lr_scale"]
    assert len({group["lr"] for group in groups}) >= 4
    sam = PlainSAM(groups, torch.optim.AdamW, rho=RHO)
    average = [p.detach().clone() for p in plain.parameters()]
    for batch in loader:
        plain_step(plain, sam, [batch], oracle.cross_entropy, 1, 1.0)
        average = [0.9 * a + 0.1 * p.detach() for a, p in zip(average, plain.parameters(), strict=True)]
    assert furthest(made["model"], plain) < 1e-6
    assert furthest(dict(enumerate(made["ema"].module.parameters())), dict(enumerate(average))) < 1e-6


def test_fastai():
    framework("fastai")
    from fastai.basics import DataLoader, DataLoaders, Learner, OptimWrapper
    from fastai.callback.core import Callback
    from fastai.callback.fp16 import MixedPrecision
    from fastai.callback.training import GradientAccumulation, GradientClip

    made = run("fastai", Callback=Callback, OptimWrapper=OptimWrapper)
    model = small_net(torch.float32)
    rows = list(zip(*oracle.data(24, torch.float32), strict=True))
    data = DataLoaders(DataLoader(rows, bs=4), DataLoader(rows[:4], bs=4))
    callbacks = [made["SAMCallback"](), GradientAccumulation(8), GradientClip(0.2)]
    learner = Learner(data, model, nn.functional.cross_entropy, opt_func=made["opt_func"], cbs=callbacks)
    with learner.no_bar(), learner.no_logging():
        learner.fit(2, LR)
    plain = small_net(torch.float32)
    sam = PlainSAM(plain.parameters(), rho=RHO, lr=LR)
    for _ in range(2):
        for window in oracle.windows(batches(24, dtype=torch.float32), 2):
            plain_step(plain, sam, window, oracle.cross_entropy, 2, 0.2)
    assert furthest(model, plain) < 1e-5
    learner.add_cb(MixedPrecision())
    with learner.no_bar(), learner.no_logging(), pytest.raises(AssertionError, match="to_fp16"):
        learner.fit(1, LR)


def test_skorch():
    skorch = framework("skorch")

    options = {"batch_size": 4, "max_epochs": 2, "train_split": None, "verbose": 0, "criterion": nn.CrossEntropyLoss}
    x, y = oracle.data()
    net = run("skorch", NeuralNetClassifier=skorch.NeuralNet, module=small_net(), options=options, x=x, y=y)["net"]
    plain, record = small_net(), oracle.Record()
    sam = PlainSAM(plain.parameters(), rho=RHO, lr=LR)
    for batch in batches() * 2:
        plain_step(plain, sam, [batch], oracle.cross_entropy, 1, record=record)
    losses = [sum(record.losses[:7]) / 7, sum(record.losses[7:]) / 7]
    assert furthest(net.module_, plain) < CLOSE
    assert type(net.optimizer_) is SAM
    assert net.history[:, "train_loss"] == pytest.approx(losses, rel=1e-6)  # the first passes'
    copied = pickle.loads(pickle.dumps(net)).partial_fit(x, y, epochs=1)
    assert furthest(copied.module_, net.partial_fit(x, y, epochs=1).module_) == 0.0


def test_ignite():
    framework("ignite")
    from ignite.engine import Engine

    model = small_net()
    run("Ignite", Engine=Engine, model=model, loader=batches(), loss_fn=oracle.cross_entropy)
    assert furthest(model, plain_run()) < CLOSE


def test_keras():
    keras = framework("keras")
    assert keras.backend.backend() == "torch"
    made = run("Keras", keras=keras)

    def model(cls: Any) -> Any:
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
        return cls([keras.Input((6,)), *layers])

    x, y = oracle.data(dtype=torch.float32)
    trained, plain = model(made["SAMModel"]), model(keras.Sequential)
    trained.sam = SAM([v.value for v in trained.trainable_variables], torch.optim.SGD, lr=LR, rho=RHO)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained.compile(optimizer=None, loss=loss, metrics=["accuracy"], jit_compile=False)
    history = trained.fit(x, y, batch_size=4, shuffle=False, verbose=0).history
    statistics = [v.value for v in plain.non_trainable_variables if "moving" in v.path]
    sam = PlainSAM([v.value for v in plain.trainable_variables], rho=RHO, lr=LR)
    losses, right = [], 0
    for batch, labels in batches(dtype=torch.float32):
        out = plain(batch, training=True)
        first = nn.functional.cross_entropy(out, labels)
        first.backward()
        losses.append(float(first.detach()))
        right += int((out.argmax(1) == labels).sum())
        old = [s.detach().clone() for s in statistics]
        sam.first_step()
        nn.functional.cross_entropy(plain(batch, training=True), labels).backward()
        with torch.no_grad():
            for statistic, value in zip(statistics, old, strict=True):
                statistic.copy_(value)
        sam.second_step()
    for a, b in zip(trained.variables, plain.variables, strict=False):
        assert float((a.value - b.value).detach().abs().max()) < 1e-5, a.path
    assert history["loss"] == pytest.approx([sum(losses) / 7], rel=1e-5)
    assert history["accuracy"] == pytest.approx([right / 28], rel=1e-5)
    halved = keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2)
    with pytest.raises(ValueError, match="learning_rate"):  # with Keras' own optimizer it would change nothing
        trained.fit(x, y, verbose=0, callbacks=[halved])


def test_pyg():
    framework("torch_geometric")
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import BatchNorm, GCNConv, global_mean_pool

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.conv, self.norm, self.out = GCNConv(6, 8), BatchNorm(8), nn.Linear(8, 3)
            self.double()

        def forward(self, graph: Any) -> torch.Tensor:
            x = self.conv(graph.x, graph.edge_index)
            graph.x = x  # the second pass finds what was there
            return self.out(global_mean_pool(torch.tanh(self.norm(x)), graph.batch))

    torch.manual_seed(2)
    x, edges, y = torch.randn(12, 9, 6).double(), torch.randint(0, 9, (12, 2, 20)), torch.randint(0, 3, (12, 1))
    graphs = [Data(*graph, y=label) for *graph, label in zip(x, edges, y, strict=True)]
    model, plain = Network(), Network()
    run("PyG", model=model, loader=DataLoader(graphs, batch_size=4))
    sam = PlainSAM(plain.parameters(), rho=RHO, lr=LR)
    for batch in DataLoader(graphs, batch_size=4):
        plain_step(plain, sam, [batch], lambda m, graph: nn.functional.cross_entropy(m(copy(graph)), graph.y), 1)
    assert furthest(model, plain) < CLOSE


def test_schedulefree():
    schedulefree = framework("schedulefree")
    model, plain = small_net(), small_net()
    run("schedulefree", schedulefree=schedulefree, model=model, loader=batches(), loss_fn=oracle.cross_entropy)
    sam = PlainSAM(plain.parameters(), schedulefree.SGDScheduleFree, rho=RHO, lr=LR)
    sam.base.train()
    for batch in batches():
        plain_step(plain, sam, [batch], oracle.cross_entropy, 1)
    sam.base.eval()
    assert furthest(model, plain) < CLOSE


def test_hydra():
    hydra = framework("hydra")
    from omegaconf import OmegaConf

    config = OmegaConf.create(recipes("Hydra", "yaml")[0])
    optimizer = run("Hydra", hydra=hydra, config=config, model=small_net())["optimizer"]
    assert type(optimizer) is SAM
    assert type(optimizer.base_optimizer) is torch.optim.SGD
    assert (optimizer.defaults["rho"], optimizer.defaults["lr"]) == (0.05, 0.1)
    assert optimizer._schedule == Schedule(every=2)
    copied = pickle.loads(pickle.dumps(optimizer))  # as Optuna and Ray send what they train
    assert copied._schedule == Schedule(every=2)
    assert len(copied.param_groups[0]["params"]) == 6
