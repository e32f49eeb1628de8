"""What else can be kept: statistics that are frozen parameters, buffers that the user names; and lists of models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import same_bits
from norms import batch, statistics, unchanged
from torch import Tensor, nn

from sam_fast import SAM, BatchNormSnapshot, disable_running_stats, enable_running_stats, frozen_running_stats

pytestmark = pytest.mark.usefixtures("forced_backend")


class KerasNorm(nn.Module):
    """Keeps its variables as Keras 3 does on torch: parameters under their paths, statistics among them as frozen
    ones.
    """

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        frozen = {"net/norm/moving_mean": torch.zeros(features), "net/norm/moving_variance": torch.ones(features)}
        trained = {"net/norm/gamma": torch.ones(features), "net/norm/beta": torch.zeros(features)}
        self.variables = nn.ParameterDict(
            {
                **{name: nn.Parameter(value) for name, value in trained.items()},
                **{name: nn.Parameter(value, requires_grad=False) for name, value in frozen.items()},
                "net/seed": nn.Parameter(torch.zeros(2), requires_grad=False),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(0), x.var(0)
        if self.training:
            with torch.no_grad():
                for name, value in (("net/norm/moving_mean", mean), ("net/norm/moving_variance", variance)):
                    self.variables[name].copy_(self.variables[name] * 0.9 + value * 0.1)
                self.variables["net/seed"] += 1
        return (x - mean) / (variance + 1e-3).sqrt() * self.variables["net/norm/gamma"] + self.variables[
            "net/norm/beta"
        ]


class Observer(nn.Module):
    """As quantisation-aware training has them: resizes its statistics in place when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("min_val", torch.tensor([]))
        self.register_buffer("max_val", torch.tensor([]))

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.detach().amin(0), x.detach().amax(0)
        if self.min_val.numel():
            low, high = torch.minimum(low, self.min_val), torch.maximum(high, self.max_val)
        self.min_val.resize_(low.shape).copy_(low)
        self.max_val.resize_(high.shape).copy_(high)
        return x


class ExtraNet(nn.Module):
    """A spectral norm, an observer, a BatchNorm, and a buffer that nobody names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)
        self.act = nn.Module()
        self.act.observer = Observer()
        self.head = nn.Linear(4, 2)
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.head(self.act.observer(self.norm(self.linear(x))))


EXTRA = ("_u", "_v", "*.observer.*")


def by_function(name: str, tensor: Tensor) -> bool:
    assert isinstance(tensor, Tensor)
    return name.endswith(("._u", "._v")) or ".observer." in name


def passed(model: nn.Module, seed: int = 1) -> Tensor:
    loss = model(batch(seed)).square().mean()
    loss.backward()
    return loss


# ---- In every style --------------------------------------------------------------------------------------------------


@contextmanager
def disabled(model: Any, optimizer: SAM, extra: Any) -> Iterator[None]:
    disable_running_stats(model, extra)
    yield
    enable_running_stats(model)


@contextmanager
def disabled_to_the_end(model: Any, optimizer: SAM, extra: Any) -> Iterator[None]:
    disable_running_stats(model, extra_buffers=extra)
    yield


@contextmanager
def second_pass(model: Any, optimizer: SAM, extra: Any) -> Iterator[None]:
    with optimizer.second_pass(model, extra_buffers=extra):
        yield


@contextmanager
def frozen(model: Any, optimizer: SAM, extra: Any) -> Iterator[None]:
    with frozen_running_stats(model, extra_buffers=extra):
        yield


@contextmanager
def snapshot(model: Any, optimizer: SAM, extra: Any) -> Iterator[None]:
    saved = BatchNormSnapshot(model, extra_buffers=extra)
    saved.save()
    yield
    saved.restore()


STYLES = [disabled, disabled_to_the_end, second_pass, frozen, snapshot]
every_style = pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)


def run_step(models: Any, run: Callable[[], Any], optimizer: SAM, style: Any, extra: Any) -> None:
    run()
    optimizer.first_step(zero_grad=True)
    with style(models, optimizer, extra):
        run()
    optimizer.second_step(zero_grad=True)


def frozen_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.guarantee(id="statistics-named")
@every_style
def test_frozen_parameters_called_by_their_paths(style: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), KerasNorm(), nn.Linear(4, 2))
    optimizer = SAM([p for p in model.parameters() if p.requires_grad], lr=0.1, rho=0.1)
    objects = list(model.parameters())
    for seed in range(3):
        twin = copy.deepcopy(model)
        twin(batch(seed))
        run_step(model, lambda seed=seed: passed(model, seed), optimizer, style, ())
        enable_running_stats(model)
        for name, value in frozen_parameters(twin).items():
            found = dict(model.named_parameters())[name]
            assert same_bits([found], [value]) != name.endswith("seed"), name
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))


def test_frozen_parameters_in_a_closure_and_in_a_run_on_another_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 4), KerasNorm(), nn.Linear(4, 2))
    optimizer = SAM([p for p in model.parameters() if p.requires_grad], lr=0.1, rho=0.1)
    twin = copy.deepcopy(model)
    twin(batch())
    optimizer.step(lambda: passed(model))
    mean = "1.variables.net/norm/moving_mean"
    assert same_bits([frozen_parameters(model)[mean]], [frozen_parameters(twin)[mean]])
    disable_running_stats(model)
    model(batch())
    model.double()
    enable_running_stats(model)
    assert same_bits([frozen_parameters(model)[mean]], [frozen_parameters(twin)[mean].double()])
    assert not dict(model.named_parameters())[mean].requires_grad


def test_a_parameter_that_is_trained_is_no_statistic() -> None:
    model = nn.Module()
    model.running_scale = nn.Parameter(torch.ones(2))
    with frozen_running_stats(model), torch.no_grad():
        model.running_scale.add_(1)
    assert model.running_scale.tolist() == [2.0, 2.0]


@pytest.mark.guarantee(id="statistics-named")
@every_style
@pytest.mark.parametrize("extra", [EXTRA, list(EXTRA), by_function], ids=["tuple", "list", "function"])
def test_buffers_that_are_named(style: Any, extra: Any) -> None:
    model = ExtraNet()
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)
    for seed in range(3):
        twin = copy.deepcopy(model)
        twin(batch(seed))
        run_step(model, lambda seed=seed: passed(model, seed), optimizer, style, extra)
        enable_running_stats(model)
        expected = dict(twin.named_buffers())
        for name, buffer in model.named_buffers():
            assert same_bits([buffer], [expected[name]]) == (name != "seen"), name


def test_buffers_that_are_named_in_a_closure() -> None:
    model = ExtraNet()
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)
    for given in (
        {"extra_buffers": EXTRA},
        {"extra_buffers": by_function, "model": model},
        {"extra_buffers": EXTRA, "model": [model]},
    ):
        twin = copy.deepcopy(model)
        twin(batch())
        optimizer.zero_grad()
        optimizer.step(lambda: passed(model), **given)
        expected = dict(twin.named_buffers())
        for name, buffer in model.named_buffers():
            assert same_bits([buffer], [expected[name]]) == (name != "seen"), name


def test_what_is_not_named_is_not_kept() -> None:
    model = ExtraNet()
    model(batch())
    before = {name: b.clone() for name, b in model.named_buffers()}
    with frozen_running_stats(model, extra_buffers="_u"):
        model(batch(2) * 3)
    changed = [name for name, b in model.named_buffers() if not same_bits([b], [before[name]])]
    assert [name.rpartition(".")[2] for name in changed] == ["seen", "_v", "min_val", "max_val"]


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("min_val", ["a.min_val", "b.c.min_val"]),
        ("a.min_val", ["a.min_val"]),
        ("c.*", ["b.c.min_val", "b.c.max_val"]),
        ("b.*", ["b.c.min_val", "b.c.max_val"]),
        ("*_val", ["a.min_val", "a.max_val", "b.c.min_val", "b.c.max_val"]),
        ("m??_val", ["a.min_val", "a.max_val", "b.c.min_val", "b.c.max_val"]),
        ("b*max_val", ["b.c.max_val"]),
    ],
)
def test_what_a_pattern_fits(pattern: str, kept: list[str]) -> None:
    model = nn.Module()
    model.a, model.b = Observer(), nn.Module()
    model.b.c = Observer()
    with frozen_running_stats(model, pattern):
        model.a(batch())
        model.b.c(batch())
    assert [name for name, b in model.named_buffers() if not b.numel()] == kept


def test_a_statistic_that_was_resized_in_place_gets_its_shape_back() -> None:
    model = nn.Sequential(Observer(), nn.BatchNorm1d(4))
    before = statistics(model)
    saved = BatchNormSnapshot(model, "m??_val")
    saved.save()
    for _ in range(2):
        model(batch())
        saved.restore()
        assert unchanged(model, before)
    model(batch())
    before = statistics(model)
    saved.save()
    model(batch(2) * 9)
    saved.restore()
    assert unchanged(model, before)


@pytest.mark.parametrize("wrong", [3, None, ("a", 3), [torch.ones(1)]])
def test_a_wrong_extra_buffers_is_refused(wrong: Any) -> None:
    model = ExtraNet()
    for call in (
        BatchNormSnapshot,
        disable_running_stats,
        lambda m, extra_buffers: frozen_running_stats(m, extra_buffers).__enter__(),
    ):
        with pytest.raises(TypeError, match="extra_buffers"):
            call(model, extra_buffers=wrong)


@pytest.mark.guarantee(id="statistics-named")
@pytest.mark.parametrize("where", ["second_pass", "closure", "disable"])
def test_a_name_that_fits_nothing_is_refused_before_anything_is_changed(where: str) -> None:
    model = ExtraNet()
    optimizer = SAM(model.parameters(), lr=0.1)
    if where != "closure":
        passed(model)
        optimizer.first_step()
    before, perturbed, names = statistics(model), optimizer.perturbed, ("_u", "weight_u")

    def wrong() -> None:
        if where == "second_pass":
            optimizer.second_pass(model, extra_buffers=names).__enter__()
        elif where == "closure":
            optimizer.step(lambda: passed(model), model=model, extra_buffers=names)
        else:
            disable_running_stats(model, names)

    with pytest.raises(ValueError, match="'weight_u'"):
        wrong()
    assert optimizer.perturbed == perturbed
    assert unchanged(model, before)
    passed(model)
    assert not unchanged(model, before)
    optimizer.restore()
    assert not unchanged(model, before)


# ---- Lists of models -------------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="statistics-models")
@every_style
@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList])
def test_lists_of_models(style: Any, kind: Callable[[list[nn.Module]], Any]) -> None:
    models = [
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        nn.Linear(4, 4),
        nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)),
    ]
    optimizer = SAM([p for model in models for p in model.parameters()], lr=0.1, rho=0.1)
    for seed in range(3):

        def run(models: list[nn.Module] = models, seed: int = seed) -> None:
            passed(nn.Sequential(*models), seed)

        twins = copy.deepcopy(models)
        run(twins)
        run_step(kind(models), run, optimizer, style, ())
        enable_running_stats(kind(models[::-1]))
        for model, twin in zip(models, twins, strict=True):
            assert unchanged(model, statistics(twin))


def test_first_pass_takes_a_list() -> None:
    models = [nn.Linear(4, 4), nn.BatchNorm1d(4)]
    optimizer = SAM([p for model in models for p in model.parameters()], lr=0.1)
    with optimizer.first_pass(models, sync=False):
        passed(nn.Sequential(*models))
    optimizer.first_step()
    with optimizer.second_pass((models[0], models[1])):
        passed(nn.Sequential(*models))
    optimizer.second_step()


@pytest.mark.guarantee(id="statistics-models")
@pytest.mark.parametrize(
    "wrong",
    [None, 3, "model", [nn.Linear(1, 1), None], {"a": nn.Linear(1, 1)}, nn.Linear],
    ids=lambda w: type(w).__name__,
)
def test_anything_else_is_refused_before_anything_is_changed(wrong: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = SAM(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"first_pass.*torch\.nn\.Module"), optimizer.first_pass(wrong):
        pass
    passed(model)
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.first_step(zero_grad=True)
    moved = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=r"second_pass.*torch\.nn\.Module"), optimizer.second_pass(wrong):
        pass
    assert optimizer.perturbed
    assert same_bits(list(model.parameters()), moved)
    for call in (
        disable_running_stats,
        enable_running_stats,
        BatchNormSnapshot,
        lambda m: frozen_running_stats(m).__enter__(),
    ):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module, or a list or tuple"):
            call(wrong)
    with optimizer.second_pass(model):
        passed(model)
    optimizer.restore()
    assert same_bits(list(model.parameters()), weights)
