"""step(closure): the second call of the closure does not count in running statistics, whatever it runs."""

from __future__ import annotations

import copy
import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from cases import SmallNet, batches, same_bits
from norms import KINDS, Kind, MovingNorm, ReassigningNorm, Recorder, statistics, unchanged
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy
from torch.nn.modules import module as torch_module

from sam_fast import SAM, closure_stats
from sam_fast.closure_stats import uncounted_forwards

STEPS = 3
MODULES = [nn.Identity() for _ in range(10)]
A, B, C, D, E, F, G, H, I, J = MODULES  # noqa: E741


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Iterator[None]:
    hooks = len(torch_module._global_forward_pre_hooks)
    yield
    assert len(torch_module._global_forward_pre_hooks) <= hooks


pytestmark = pytest.mark.usefixtures("forced_backend")


class PartsNet(nn.Module):
    """An encoder and a head that are called one by one, with native and custom layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Flatten(), nn.Linear(144, 9), MovingNorm(9)
        )
        self.head = nn.Sequential(ReassigningNorm(9), nn.Linear(9, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Wrapper(nn.Module):
    """Like DistributedDataParallel: another module around the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def by_functional_layers(model: Any, x: Tensor) -> Tensor:
    """No module with statistics is called."""
    conv, norm, flat, linear, moving = model.encoder
    out = batch_norm(conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1)
    mean = linear(flat(out)).mean(0)
    if model.training:
        moving.moving_mean.lerp_(mean.detach(), 0.1)
    return model.head(linear(flat(out)) - mean)


def by_functional_call(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(model, {name: p * 1 for name, p in model.named_parameters()}, x)


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "model": lambda model, x: model(x),
    "parts": lambda model, x: model.head(model.encoder(x)),
    "part-then-all": lambda model, x: model.encoder(x).mean() + model(x),
    "all-then-part": lambda model, x: model(x) + model.encoder(x).mean(),
    "layers": lambda model, x: nn.Sequential(*model.encoder, *model.head)(x),
    "forward": lambda model, x: model.forward(x),
    "wrapper-made-in-the-closure": lambda model, x: Wrapper(Wrapper(model))(x),
    "functional-call": by_functional_call,
    "functional-layers": by_functional_layers,
    "checkpoint": lambda model, x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def loss_of(call: Callable[[Any, Tensor], Tensor], model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = cross_entropy(call(model, x), y)
    loss.backward()
    return loss


class Trial:
    """step(closure) beside the oracle: in a second model, both passes with the buffers copied back by hand after the
    second.
    """

    def __init__(self, model: nn.Module, outside: bool, flatten: bool = False) -> None:
        self.model, self.outside = model, outside
        self.twin = copy.deepcopy(model)
        self.optimizer = SAM(model.parameters(), lr=0.1, rho=0.1, flatten=flatten)
        self.other = SAM(self.twin.parameters(), lr=0.1, rho=0.1, flatten=flatten)

    def step(self, run: Callable[[nn.Module], Any], **options: Any) -> None:
        closure = self.closure(run)
        self.optimizer.zero_grad()
        if self.outside:
            run(self.model)
        self.optimizer.step(closure, **options)
        self.other.zero_grad()
        run(self.twin)
        self.other.first_step(zero_grad=True)
        objects = [(m, dict(m._buffers)) for m in self.twin.modules() if isinstance(m._buffers, dict)]
        values = statistics(self.twin)
        run(self.twin)
        for module, buffers in objects:
            module._buffers.update(buffers)
        for buffer, value in zip(self.twin.buffers(), values, strict=True):
            buffer.copy_(value)
        self.other.second_step()

    def closure(self, run: Callable[[nn.Module], Any]) -> Callable[[], Any]:
        return lambda: run(self.model)

    def check(self) -> None:
        assert unchanged(self.model, statistics(self.twin))
        assert same_bits(list(self.model.parameters()), list(self.twin.parameters()))


outside_or_not = pytest.mark.parametrize("outside", [False, True], ids=["both-calls", "first-gradients-from-outside"])


@pytest.mark.guarantee(id="statistics-in-closures")
@outside_or_not
@every_call
def test_the_second_call_does_not_count(call: Callable[[Any, Tensor], Tensor], outside: bool) -> None:
    trial = Trial(PartsNet(), outside)
    for x, y in batches(STEPS):
        trial.step(lambda model, x=x, y=y: loss_of(call, model, x, y))
        trial.check()


@outside_or_not
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_layer(kind: Kind, outside: bool) -> None:
    model = nn.Sequential(kind.make())
    weight = nn.Parameter(torch.ones(1, dtype=kind.dtype))
    optimizer, recorder = SAM([weight], lr=0.1), Recorder(model)
    recorder.initial.register_parameter("w", nn.Parameter(weight.detach().clone()))

    def run(seed: int) -> Tensor:
        loss = (model(kind.batch(seed) * weight)).square().sum()
        loss.backward()
        return loss

    for seed in range(3):
        expected = copy.deepcopy(model)
        expected(kind.batch(seed) * weight.detach())
        optimizer.zero_grad()
        if outside:
            run(seed)
        optimizer.step(lambda seed=seed: run(seed))
        assert unchanged(model, statistics(expected))


@pytest.mark.guarantee(id="statistics-in-closures")
def test_two_models_and_one_that_the_optimizer_does_not_have(flatten: bool) -> None:
    """A generator's step runs the discriminator too."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.other = SmallNet(), SmallNet(), nn.BatchNorm1d(10)

    trial = Trial(Pair(), outside=False)
    trial.optimizer = SAM([*trial.model.a.parameters(), *trial.model.b.parameters()], lr=0.1, rho=0.1, flatten=flatten)
    trial.other = SAM([*trial.twin.a.parameters(), *trial.twin.b.parameters()], lr=0.1, rho=0.1, flatten=flatten)
    for x, y in batches(STEPS):

        def run(pair: Any, x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = cross_entropy(pair.other(pair.a(x) + pair.b(x)), y)
            loss.backward()
            return loss

        trial.step(run)
        trial.check()


class Deep:
    """A trainer that hides its model among other things."""

    def __init__(self, model: nn.Module) -> None:
        self.data = [[[] for _ in range(20)] for _ in range(400)]
        self.inner = {"loop": [{"net": model}]}

    def __call__(self) -> Tensor:
        x, y = self.batch
        return loss_of(CALLS["model"], self.inner["loop"][0]["net"], x, y)


def test_a_framework_that_gives_an_object_as_closure() -> None:
    model = PartsNet()
    optimizer, recorder, deep = SAM(model.parameters(), lr=0.1, rho=0.1), Recorder(model), Deep(model)
    for deep.batch in batches(STEPS):
        recorder.first_pass(deep.batch[0])
        optimizer.step(deep)
        optimizer.zero_grad()
    assert unchanged(model, recorder.replay())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@outside_or_not
def test_scripted_models(outside: bool) -> None:
    model = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.Linear(5, 10)))
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)
    for x, y in batches(STEPS):
        before = copy.deepcopy(model)
        before(x)
        optimizer.zero_grad()
        if outside:
            loss_of(CALLS["model"], model, x, y)
        optimizer.step(lambda x=x, y=y: loss_of(CALLS["model"], model, x, y))
        assert unchanged(model, statistics(before))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_second_call_that_raises(error: type[BaseException]) -> None:
    model = PartsNet()
    optimizer, recorder = SAM(model.parameters(), lr=0.1), Recorder(model)
    (x, y), *_ = batches(1)
    recorder.first_pass(x)
    weights = [p.detach().clone() for p in model.parameters()]
    calls = []

    def closure() -> Tensor:
        loss = loss_of(CALLS["model"], model, x, y)
        calls.append(loss)
        if len(calls) == 2:
            raise error
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert unchanged(model, recorder.replay())
    assert same_bits(list(model.parameters()), weights)


def test_frozen_layers_and_evaluation_mode() -> None:
    model = PartsNet().eval()
    before = statistics(model)
    optimizer = SAM(model.parameters(), lr=0.1)
    for x, y in batches(2):
        optimizer.step(lambda x=x, y=y: loss_of(CALLS["model"], model, x, y))
    assert unchanged(model, before)


@pytest.mark.parametrize("deep", [False, True], ids=["known", "found-when-called"])
@pytest.mark.parametrize("make", [SmallNet, PartsNet])
def test_functional_call_with_buffers_of_ones_own(make: Callable[[], nn.Module], deep: bool) -> None:
    """They are counted once, and the module keeps its own, untouched, as the same objects."""
    model = make()
    hidden = [[[[] for _ in range(400)], [[[[model]]]]]] if deep else [[[], [[[[model]]]]]]
    own = {name: b.clone() for name, b in model.named_buffers()}
    params = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    objects, before = list(model.buffers()), statistics(model)
    optimizer = SAM(params.values(), lr=0.1, rho=0.1)
    (x, y), *_ = batches(1)
    twin = copy.deepcopy(model)
    twin(x)

    class Opaque:
        def __init__(self) -> None:
            self.hidden = hidden

        def __call__(self) -> Tensor:
            loss = cross_entropy(torch.func.functional_call(self.hidden[0][1][0][0][0][0], {**params, **own}, x), y)
            loss.backward()
            return loss

    optimizer.step(Opaque())
    assert unchanged(model, before)
    assert all(a is b for a, b in zip(model.buffers(), objects, strict=True))
    reassigned = {"head.0.running_mean", "head.0.num_batches_tracked"}  # functional_call drops what the layer makes
    for name, buffer in twin.named_buffers():
        assert same_bits([own[name]], [buffer]) or name in reassigned


@pytest.mark.guarantee(id="statistics-in-closures")
@pytest.mark.parametrize("per_model", [False, True], ids=["vmap", "vmap-of-grad"])
def test_the_stacked_buffers_of_an_ensemble(per_model: bool) -> None:
    models = [nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    skeleton, x = copy.deepcopy(models[0]), torch.randn(6, 4)

    def loss_of(params: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(skeleton, (params, buffers), x).square().mean()

    def closure() -> Tensor:
        if not per_model:
            loss = torch.vmap(loss_of)(params, buffers).sum()
            loss.backward()
            return loss
        grads, losses = torch.vmap(torch.func.grad_and_value(loss_of))(params, buffers)
        for name, p in params.items():
            p.grad = grads[name].detach()
        return losses.sum()

    SAM(params.values(), lr=0.1, rho=0.1).step(closure)
    for model in models:
        model(x)
    for name, right in torch.func.stack_module_state(models)[1].items():  # type: ignore[arg-type]
        torch.testing.assert_close(buffers[name], right)


def test_a_closure_without_modules_costs_nothing_and_warns_of_nothing() -> None:
    p = nn.Parameter(torch.ones(3))

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAM([p], lr=0.1).step(closure)


def test_as_a_context_of_its_own() -> None:
    model, other = SmallNet(), SmallNet()
    before = statistics(model)
    x, _ = batches(1)[0]
    with uncounted_forwards():
        model(x)
        model.features(x)
        with uncounted_forwards(other):
            model(x)
            other(x)
    assert unchanged(model, before)
    assert unchanged(other, statistics(SmallNet()))


@pytest.mark.parametrize("wrong", [3, "model", [3], {"a": nn.Linear(1, 1)}])
def test_a_wrong_model_is_named_before_anything_happens(wrong: Any) -> None:
    model = SmallNet()
    optimizer, before = SAM(model.parameters(), lr=0.1), statistics(model)
    x, y = batches(1)[0]
    with pytest.raises(TypeError, match="Module"):
        optimizer.step(lambda: loss_of(CALLS["model"], model, x, y), model=wrong)
    assert unchanged(model, before)
    assert not optimizer.perturbed


def test_a_large_container_beside_the_model_is_not_walked() -> None:
    class Agent:
        def __init__(self) -> None:
            self.buffer = deque([[i] for i in range(200_000)])
            self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

        def closure(self) -> None:
            self.model(torch.ones(8, 3)).sum().backward()

    agent = Agent()
    optimizer = SAM(agent.model.parameters(), lr=0.1)
    with mock.patch.object(closure_stats.gc, "get_referents", wraps=gc.get_referents) as asked:
        optimizer.step(agent.closure, passes="both")
    assert not any(isinstance(parent, deque) for call in asked.call_args_list for parent in call.args)
    assert int(agent.model[1].num_batches_tracked) == 1


def test_what_a_closure_refers_to_is_found_in_the_order_of_its_code() -> None:
    """Not in one that differs between processes: all ranks are to find the same, even where there is too much."""
    assert closure_stats.refers_to(lambda: (A, B, C, D, E, F, G, H, I, J))[0] == MODULES
