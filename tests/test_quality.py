"""The quality experiment: every contender's steps, the counted cost, a stopped experiment that goes on, the report."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from bench.quality import __main__ as command
from bench.quality import pictures, plan, report, tasks, timing, train
from bench.quality.contenders import CONTENDERS, Trainer
from bench.quality.train import Run
from examples.fashion_mnist.data import load

STEPS, BATCH, LR, DECAY, RHO = 8, 16, 0.1, 0.02, 0.3

# What each contender's 8 steps do, by hand: f = a first pass, p = previous gradient, m = momentum, - = nothing.
STEPS_OF = {
    "sgd": "--------",
    "sgd-1.25x": "--------",
    "sgd-2x": "--------",
    "sam": "ffffffff",
    "half": "ffffffff",
    "quarter": "ffffffff",
    "quarter-second-counts": "ffffffff",
    "eighth": "ffffffff",
    "every2": "f-f-f-f-",
    "every4": "f---f---",
    "late-half": "----ffff",
    "late-quarter": "------ff",
    "quarter-late-half": "----ffff",
    "quarter-late-quarter": "------ff",
    "norms": "ffffffff",
    "norms-quarter": "ffffffff",
    "previous": "-ppppppp",
    "every4+previous": "fpppfppp",
    "momentum+": "-mmmmmmm",
    "momentum-": "-mmmmmmm",
    "friendly": "ffffffff",
}
QUARTERS = ("quarter", "quarter-second-counts", "quarter-late-half", "quarter-late-quarter", "norms-quarter")
ROWS = {"half": 2, "eighth": 8} | dict.fromkeys(QUARTERS, 4)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10), nn.LayerNorm(10)]
    return nn.Sequential(*layers).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, BATCH, 1, 6, 6, generator=draw, dtype=torch.float64)
    return list(zip(x, torch.randint(10, (STEPS, BATCH), generator=draw), strict=True))


def simulate(name: str, model: nn.Module) -> dict[str, Tensor]:
    """The contender's training in another style: stateless calls on one flat vector, SGD and the cosine written out."""
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for _, p in model.named_parameters()]
    sizes = [p.numel() for _, p in model.named_parameters()]
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    mask = torch.cat([torch.full((k,), float(n[0] in "15"), dtype=w.dtype) for n, k in zip(names, sizes, strict=True)])
    mask = mask if name.startswith("norms") else torch.ones_like(w)

    def gradient(at: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        at = at.clone().requires_grad_()
        values = {n: v.view(s) for n, v, s in zip(names, at.split(sizes), shapes, strict=True)}
        after = {n: b.clone() for n, b in buffers.items()}
        loss = cross_entropy(functional_call(model, {**values, **after}, (x,)), y)
        return torch.autograd.grad(loss, at)[0], after

    momentum, previous, mean = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for t, (x, y) in enumerate(batches()):
        kind, rows, counted = STEPS_OF[name][t], ROWS.get(name, 1), None
        u = {"p": previous, "m": momentum}.get(kind, torch.zeros_like(w))
        if kind == "f":
            u, counted = gradient(w, x[::rows], y[::rows])
            if name == "friendly":
                mean = 0.9 * mean + 0.1 * u
                u = u - mean
        u = u * mask * (-1 if name == "momentum-" else 1)
        e = RHO * u / u.norm() if u.any() else u
        previous, second = gradient(w + e, x, y)
        buffers = second if counted is None or name == "quarter-second-counts" else counted
        momentum = 0.9 * momentum + previous + DECAY * w
        w = w - LR * (1 + math.cos(math.pi * t / STEPS)) / 2 * momentum
    values = {n: v.view(s) for n, v, s in zip(names, w.split(sizes), shapes, strict=True)}
    return {**values, **buffers}


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_trains_as_an_independent_simulation_in_float64(name):
    model = small_model()
    expected = simulate(name, copy.deepcopy(model))
    trainer = Trainer(model, CONTENDERS[name], steps=STEPS, rho=RHO, lr=LR, weight_decay=DECAY)
    for x, y in batches():
        trainer.train_batch(x, y)
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue  # it counts passes, and nothing reads it
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12, msg=lambda text, k=key: f"{k}: {text}")
    assert trainer.climbed == STEPS - STEPS_OF[name].count("-")


@pytest.mark.parametrize("name", CONTENDERS)
def test_the_cost_is_what_the_passes_make(name):
    trainer = Trainer(small_model(), CONTENDERS[name], steps=STEPS, rho=RHO, lr=LR, weight_decay=DECAY)
    for x, y in batches():
        trainer.train_batch(x, y)
    k = 2 / 3 if name.startswith("norms") else 1.0
    firsts = STEPS_OF[name].count("f")
    assert trainer.cost / (STEPS * BATCH) == pytest.approx(1 + firsts / STEPS * k / ROWS.get(name, 1))


def test_a_first_pass_for_normalization_layers_computes_no_other_gradient():
    computed: list[str] = []
    model = small_model()
    model[0].weight.register_hook(lambda _: computed.append("convolution"))
    model[1].weight.register_hook(lambda _: computed.append("norm"))
    trainer = Trainer(model, CONTENDERS["norms"], steps=1, rho=RHO, lr=LR, weight_decay=DECAY)
    trainer._first_pass(*batches()[0])
    assert computed == ["norm"]


# ---- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_plan(monkeypatch, tmp_path) -> Callable[[], list[Run]]:
    """Four contenders whose results are made up. Calling it does the runs that the file lacks, and returns them."""
    few = {name: CONTENDERS[name] for name in ("sgd", "sam", "quarter", "quarter-second-counts")}
    for module in (plan, report, pictures):
        monkeypatch.setattr(module, "CONTENDERS", few)
    monkeypatch.setattr(plan, "URGENT", ("sgd", "sam"))
    monkeypatch.setattr(report, "RESAMPLES", 499)
    path = tmp_path / "results.jsonl"
    writer, load = plan.Writer, plan.load
    monkeypatch.setattr(plan, "Writer", lambda: writer(path))
    monkeypatch.setattr(plan, "load", lambda: load(path))
    done: list[Run] = []

    def made_up(run: Run) -> dict[str, Any]:
        """SGD is best at lr 0.05, the others at rho 0.05. A quarter keeps 3/4 of SAM's gain, sometimes all."""
        done.append(run)
        name = run.contender.removesuffix("-second-counts")
        gain = {"sgd": 0.0, "sam": 2.0, "quarter": 1.5 if run.seed % 4 else 2.0}[name]
        gain -= 10 * abs((run.rho or run.lr) - 0.05)
        flat = {"sgd": 0.5, "sam": 0.1, "quarter": 0.2}[name]
        cost = {"sgd": 1.0, "sam": 2.0, "quarter": 1.25}[name]
        accuracy = 80 + gain + run.seed / 100
        return {"accuracy": accuracy, "sharpness": flat, "cost": cost, "diverged": False}

    monkeypatch.setattr(command, "train", made_up)

    def run() -> list[Run]:
        done.clear()
        command.run(1.0, list(tasks.TASKS))
        return list(done)

    run.path = path  # type: ignore[attr-defined]
    return run


def test_a_stopped_experiment_goes_on_where_it_was(small_plan, monkeypatch):
    whole = small_plan()
    most = sum(sum(plan.size(task, name)) for task in tasks.TASKS for name in plan.CONTENDERS)
    assert most - 3 * 3 <= len(whole) <= most  # SAM's two searches may share the seeds that follow the first
    assert len(whole) == len(set(whole))
    lines = small_plan.path.read_bytes().splitlines(keepends=True)
    for cut in (b"", lines[30][:-1], lines[30][:10]):  # between two runs; or while a line was written
        small_plan.path.write_bytes(b"".join(lines[:30]) + cut)
        assert small_plan() == whole[30:]
        assert small_plan.path.read_bytes() == b"".join(lines)
    assert small_plan() == []


def test_a_row_is_trained_again_and_compared(small_plan, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="tuning has not finished"):
        command.row("A", "sam", [0])
    small_plan()
    assert command.row("A", "sam", [0, 1]) == 0
    assert "seed 1: test accuracy 82.01 %, on file 82.01 %" in capsys.readouterr().out
    monkeypatch.setattr(command, "train", lambda run: {"accuracy": 81.0})
    assert command.row("A", "sam", [0, 1]) == 1


def test_two_processes_do_not_write_to_one_file(small_plan):
    writer = plan.Writer()
    with pytest.raises(SystemExit, match="another process"):
        plan.Writer()
    del writer
    plan.Writer()


def test_tuning_chooses_among_settings_by_the_tuning_seeds_alone(small_plan):
    runs = small_plan()
    results = plan.load()
    for task in tasks.TASKS:
        first, more, final = plan.seeds_of(task)
        assert not set(first + more) & set(final)
        chosen = plan.chosen(task, "sam", results)
        assert chosen is not None
        assert chosen.rho == 0.05
        sgd = plan.chosen(task, "sgd", results)
        assert sgd is not None
        assert chosen[:2] == sgd[:2]
        last_tuning = max(i for i, r in enumerate(runs) if r.task == task and r.contender == "sam" and r.seed >= 100)
        first_final = min(i for i, r in enumerate(runs) if r.task == task and r.contender == "sam" and r.seed < 100)
        assert last_tuning < first_final


@pytest.fixture
def digits(monkeypatch) -> None:
    """Another data set in place of Fashion-MNIST, which may have to be downloaded: digits with a margin."""
    raw = load("digits")
    train_images, test_images = (nn.functional.pad(x, [3, 3, 3, 3]) for x in (raw.train_images, raw.test_images))
    padded = dataclasses.replace(raw, train_images=train_images, test_images=test_images)
    monkeypatch.setattr(tasks, "fashion_mnist", lambda: padded)
    monkeypatch.setitem(tasks.TASKS, "B", tasks.Task(images=128, noise=0.25, epochs=4, batch=32))


def test_a_run_measures_and_a_second_time_the_same(digits):
    run = Run("B", "quarter", 0.05, 5e-4, 0.05, 3)
    found, again = train.train(run), train.train(run)
    assert found | {"seconds": 0} == again | {"seconds": 0}
    assert found["cost"] == 1.25
    assert 20 < found["accuracy"] <= 100
    assert not found["diverged"]
    longer = train.train(Run("B", "sgd-1.25x", 0.05, 5e-4, 0.0, 3))
    assert longer["cost"] == 1.25
    lost = train.train(Run("B", "sgd", 1e30, 0.0, 0.0, 3))
    assert (lost["diverged"], lost["accuracy"], lost["sharpness"]) == (True, 10.0, None)
    assert json.loads(json.dumps(lost, allow_nan=False)) == lost


def test_the_sharpness_is_the_rise_to_moved_weights():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    x, y = torch.rand(20, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (20,))
    loss = cross_entropy(net(x), y)
    w, b = torch.autograd.grad(loss, list(net.parameters()))
    e = 0.1 / torch.cat([w.flatten(), b]).norm()
    moved = cross_entropy(x.flatten(1) @ (net[1].weight + e * w).T + net[1].bias + e * b, y)
    assert train.sharpness(net, x, y, rho=0.1) == pytest.approx((moved - loss).item(), rel=1e-9)


# ---- The report ------------------------------------------------------------------------------------------------------


def test_the_report_s_figures(small_plan):
    small_plan()
    results = plan.load()
    for task in tasks.TASKS:
        sgd, sam, quarter, _ = report.rows(task, results, {})
        assert sam.gain.value == pytest.approx(2.0)
        assert report.fitness(sgd).startswith("SAM's gain is not known")
        assert "as the experiment needs (at least 0.5 points and 4 standard errors)" in report.fitness(sam)
        assert (sgd.share.value, sam.share.value) == (0.0, 1.0)
        assert quarter.share.value == pytest.approx((3 * 1.5 + 2.0) / 8)  # 0.8125
        assert 0.75 <= quarter.share.low < quarter.share.value < quarter.share.high <= 1.0
        assert quarter.sharpness == pytest.approx(0.75)
        assert quarter.cost == 1.25
        assert quarter.verdict == "not accepted"


@pytest.mark.parametrize(
    ("share", "sharpness", "time", "verdict"),
    [
        ((0.95, 0.8), 0.9, 1.2, "accepted"),
        ((0.95, 0.8), 0.9, 1.1, "accepted, stretch"),
        ((0.95, 0.8), 0.9, 1.4, "not accepted: time"),
        ((0.95, 0.8), 0.9, None, "accepted if its time is at most 1.30"),
        ((0.95, 0.7), 0.9, 1.2, "not accepted"),
        ((0.8, 0.78), 0.9, 1.2, "not accepted"),
        ((0.8, 0.5), 0.9, 1.04, "not accepted, but R >= 0.75 at <= 1.05"),
        ((0.6, 0.5), 0.9, 1.2, "R < 0.7"),
        ((0.95, 0.8), 0.7, 1.2, "not accepted: sharpness"),
        ((0.95, 0.8), None, 1.2, "not accepted: sharpness"),
    ],
)
def test_verdicts(share, sharpness, time, verdict, monkeypatch):
    class Made(report.Row):
        complete = True  # type: ignore[assignment]
        share = report.Estimate(1, 1, 1)

    monkeypatch.setattr(Made, "share", report.Estimate(share[0], share[1], 1.1))
    monkeypatch.setattr(Made, "sharpness", sharpness)
    estimate = None if time is None else report.Estimate(time, time, time)
    assert Made("A", "quarter", None, [], [], [], estimate).verdict == verdict


def test_the_bootstrap_is_paired():
    """What the seeds have in common does not widen the interval."""
    sgd = [80.0 + 5 * i for i in range(10)]
    better = [a + 1 + 0.01 * (i % 2) for i, a in enumerate(sgd)]
    found = report.resampled(report.mean_difference, better, sgd)
    assert found.value == pytest.approx(1.005)
    assert found.high - found.low < 0.02


def test_the_page_of_an_unfinished_experiment_says_so(small_plan, monkeypatch, tmp_path):
    small_plan()
    lines = small_plan.path.read_bytes().splitlines(keepends=True)
    small_plan.path.write_bytes(b"".join(lines[:40]))
    monkeypatch.setattr(report, "TIMES", tmp_path / "none.json")
    report.write(tmp_path / "page.md", tmp_path / "pictures", None)
    text = (tmp_path / "page.md").read_text()
    assert "**40 of some " in text
    assert "not measured yet" in text
    assert "nothing is accepted or rejected" in text
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"cost.png", "price.png", "tuning.png"}


def test_times_are_taken_and_reported(small_plan, digits, monkeypatch, tmp_path):
    small_plan()
    monkeypatch.setattr(timing, "CONTENDERS", plan.CONTENDERS)
    monkeypatch.setattr(timing, "TASKS", {"B": tasks.TASKS["B"]})
    timing.measure(3, tmp_path / "times.json")
    times = json.loads((tmp_path / "times.json").read_text())
    seconds = times["seconds"]["B"]
    assert {name: len(rounds) for name, rounds in seconds.items()} == dict.fromkeys(plan.CONTENDERS, 3)
    assert all(s > 0 for rounds in seconds.values() for s in rounds)
    ratios = [a / b for a, b in zip(seconds["sam"], seconds["sgd"], strict=True)]
    row = next(r for r in report.rows("B", plan.load(), times) if r.contender == "sam")
    assert row.time.value == statistics.median(ratios)
    assert next(r for r in report.rows("A", plan.load(), times) if r.contender == "sam").time is None


def test_the_committed_page_is_made_from_the_results_on_file():
    """The file may have grown since: the page says how many of its runs it is made from."""
    committed = report.PAGE.read_text()
    runs = int(committed.split("from the first ")[1].split(" runs")[0])
    results = dict(itertools.islice(plan.load().items(), runs))
    times = json.loads(timing.TIMES.read_text()) if timing.TIMES.exists() else {}
    assert report.page(results, times) == committed
