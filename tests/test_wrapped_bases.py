"""Base optimizers that wrap another one, and those that are refused, by themselves or inside a wrapper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import make_params, same_bits, two_passes, values
from plain_sam import PlainSAM, furthest
from torch import Tensor
from torch.autograd import grad
from torch.optim import Optimizer

from sam_fast import SAM, Schedule, TrainStep, disable_running_stats, enable_running_stats, options

CLOSE = 1e-12


class Outer(Optimizer):
    """Wraps another optimizer and has its own format of checkpoints, as Lookahead has."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.count = inner, 0
        self.defaults = inner.defaults
        self._optimizer_step_pre_hooks = self._optimizer_step_post_hooks = {}  # type: ignore[assignment]

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return {"outer": self.count, "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["outer"]
        self.inner.load_state_dict(state_dict["inner"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


@pytest.mark.guarantee(id="base-optimizer")
def test_a_wrapper_of_an_optimizer_as_base_saves_and_loads_in_its_own_format():
    def make(params: Any) -> SAM:
        return SAM(params, lambda groups, **options: Outer(torch.optim.SGD(groups, **options)), lr=0.1, momentum=0.9)

    whole, parts = make_params([6]), make_params([6])
    optimizer = make(whole)
    for step in range(5):
        two_passes(optimizer, whole, step)
    before = make(parts)
    for step in range(3):
        two_passes(before, parts, step)
    resumed = make(parts)
    resumed.load_state_dict(copy.deepcopy(before.state_dict()))
    assert resumed.base_optimizer.count == 3
    for step in range(3, 5):
        two_passes(resumed, parts, step)
    assert same_bits(values(whole), values(parts))


class Hessian(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        self.estimate()

    def estimate(self) -> None:
        torch.autograd.grad([], [])


class Harmless(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        with torch.autograd.profiler.record_function("step"):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-1.0)


def test_base_optimizers_that_differentiate_gradients_are_refused():
    with pytest.raises(ValueError, match="Hessian differentiates gradients"):
        SAM(make_params([3]), Hessian, lr=0.1)
    SAM(make_params([3]), Harmless, lr=0.1)


def test_the_code_of_a_class_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some loops make a new optimizer for every batch, client or test sample: reading takes longer than their step."""
    SAM(make_params([3]), Harmless, lr=0.1)
    monkeypatch.setattr(options, "dis", None)
    SAM(make_params([3]), Harmless, lr=0.1)


@pytest.mark.parametrize("name", ["AdaHessian", "SophiaH"])
def test_hessian_based_optimizers_of_pytorch_optimizer_are_refused(name):
    peers = pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ValueError, match=f"{name} differentiates gradients"):
        SAM(make_params([3]), getattr(peers, name), lr=0.1)


class Within(Optimizer):
    """Wraps optimizers without Optimizer.__init__, as torch's PostLocalSGDOptimizer."""

    def __init__(self, *inner: Optimizer) -> None:
        self.inner = inner
        self.param_groups = [group for each in inner for group in each.param_groups]

    @property
    def state(self) -> Any:
        return self.inner[0].state

    def step(self, closure: Any = None) -> None:
        for each in self.inner:
            each.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self.inner:
            each.zero_grad(set_to_none)


@pytest.mark.guarantee(id="base-optimizer")
def test_a_wrapper_that_does_without_what_every_optimizer_has():
    params, twin = make_params([5], torch.float64), make_params([5], torch.float64)
    optimizer = SAM(params, lambda groups, **options: Within(torch.optim.SGD(groups, **options)), lr=0.1)
    plain = PlainSAM(twin, torch.optim.SGD, lr=0.1)
    called = []
    optimizer.base_optimizer.register_step_post_hook(lambda *_: called.append(1)).remove()
    for step in range(3):
        two_passes(optimizer, params, step)
        two_passes(plain, twin, step)
    assert furthest(params, twin) < CLOSE
    assert not called


@pytest.mark.parametrize(
    ("inner", "reason"), [(Hessian, "Hessian diff"), (torch.optim.LBFGS, "closure"), (torch.optim.Adadelta, "rho")]
)
def test_what_is_refused_is_refused_inside_a_wrapper(inner, reason):
    with pytest.raises(ValueError, match=reason):
        SAM(make_params([3]), lambda groups: Within(torch.optim.SGD(make_params([3])), inner(groups[0]["params"])))


def imported_grad(*_: Any) -> None:
    grad([], [])


class Imported(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        imported_grad()


class Below(Hessian):
    def step(self, closure: Any = None) -> None:
        super().step()


@pytest.mark.parametrize("base", [Imported, Below])
def test_however_it_is_written(base):
    with pytest.raises(ValueError, match="differentiates gradients"):
        SAM(make_params([3]), base, lr=0.1)


class WithAClosure(torch.optim.SGD):
    """Differentiates the gradients of a closure, and does without where there is none, as heavyball's."""

    def step(self, closure: Any = None) -> None:
        self.handle(closure)
        super().step()

    def handle(self, closure: Any) -> None:
        if closure is not None:
            torch.autograd.grad(closure(), [])


def test_what_only_differentiates_the_gradients_of_a_closure_is_taken():
    params, twin = make_params([5], torch.float64), make_params([5], torch.float64)
    optimizer, plain = SAM(params, WithAClosure, lr=0.1), PlainSAM(twin, torch.optim.SGD, lr=0.1)
    for step in range(3):
        two_passes(optimizer, params, step)
        two_passes(plain, twin, step)
    assert furthest(params, twin) < CLOSE


class MaximizesByItself(torch.optim.SGD):
    """Keeps the option to itself, as the optimizers of pytorch_optimizer do."""

    def __init__(self, params: Any, lr: float, maximize: bool = False) -> None:
        super().__init__(params, lr=lr)
        self.maximize = maximize
        for group in self.param_groups:
            del group["maximize"]


@pytest.mark.guarantee(id="maximize")
@pytest.mark.parametrize("maximize", [False, True, 0, 1])
@pytest.mark.parametrize("base", ["own", "wrapped", "pytorch_optimizer"])
def test_a_base_optimizer_may_keep_maximize_to_itself(base, maximize):
    cls: Any = MaximizesByItself if base != "pytorch_optimizer" else pytest.importorskip("pytorch_optimizer").Lion
    params = make_params([5])
    before = values(params)
    optimizer = SAM(
        params, lambda groups, **o: Within(cls(groups, **o)) if base == "wrapped" else cls(groups, **o), rho=0.5,
        lr=0.1, maximize=maximize,
    )  # fmt: skip
    params[0].grad = torch.ones(5)
    optimizer.first_step()
    assert bool((params[0] < before[0]).all()) is bool(maximize)


# ---- Another base optimizer in its place -----------------------------------------------------------------------------


class Prepared(Optimizer):
    """As Accelerate's: of its optimizer's state and groups, without what Optimizer.__init__ makes."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_base_optimizer_that_is_put_in_the_place_of_another(base: Any, wrapped: bool) -> None:
    """As loops do whose framework has prepared the optimizer, and its scheduler, before there is a SAM."""
    params, twin = make_params([5, 30], torch.float64), make_params([5, 30], torch.float64)
    inner, plain = base(params, lr=0.1, weight_decay=0.1), PlainSAM(twin, base, lr=0.1, weight_decay=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.7) for each in (inner, plain.base)]
    prepared = Prepared(inner) if wrapped else inner
    optimizer = SAM(prepared.param_groups, base, lr=0.1, weight_decay=0.1)
    optimizer.base_optimizer = prepared
    for step in range(4):
        two_passes(optimizer, params, step)
        two_passes(plain, twin, step)
        for scheduler in schedulers:
            scheduler.step()
    assert furthest(params, twin) < CLOSE
    assert optimizer.state is inner.state
    assert optimizer.param_groups is inner.param_groups


def test_a_base_optimizer_that_was_put_in_place_is_watched() -> None:
    """It cannot step from w + e, and its step alone puts back the statistics of disabled layers."""
    model = torch.nn.BatchNorm1d(3)
    optimizer, x = SAM(model.parameters(), lr=0.1), torch.randn(8, 3)
    optimizer.base_optimizer = torch.optim.Adam(model.parameters(), maximize=True)
    model(x).square().mean().backward()
    w = model.weight.detach().clone()
    optimizer.first_step()
    assert float(((model.weight.detach() - w) * model.weight.grad).sum()) < 0.0  # downhill
    with pytest.raises(RuntimeError, match="second_step"):
        optimizer.base_optimizer.step()
    disable_running_stats(model)
    model(x).square().mean().backward()
    optimizer.second_step()
    mean = model.running_mean.clone()
    model(x).square().mean().backward()
    optimizer.base_optimizer.step()
    assert torch.equal(model.running_mean, mean)
    enable_running_stats(model)


def test_a_base_optimizer_that_cannot_be_one_is_refused_in_the_place_of_another() -> None:
    params = make_params([3])
    optimizer = SAM(params, lr=0.1)
    optimizer.base_optimizer = torch.optim.LBFGS(params)
    with pytest.raises(ValueError, match="LBFGS"):
        optimizer.first_step()


@pytest.mark.guarantee(id="schedule-resume")
@pytest.mark.parametrize("schedule", [Schedule(start=3), Schedule(every=2), None])
def test_the_counter_goes_on_with_the_base_optimizer_in_the_place_of_another(schedule: Schedule | None) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = SAM(model.parameters(), torch.optim.Adam, schedule=schedule)
    step, perturbed = TrainStep(model, optimizer, lambda model, x: model(x).square().mean()), []
    for number in range(8):
        if number in (1, 5):
            optimizer.base_optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            saved = optimizer.state_dict()["param_groups"][0]
            assert (saved["rho"], saved.get("sam_step")) == (0.05, None if schedule is None else number)
        assert optimizer.will_perturb == (schedule is None or schedule.perturbs(number))
        perturbed.append(step(torch.ones(4, 3)).grad_norm is not None)
    assert perturbed == [schedule is None or schedule.perturbs(number) for number in range(8)]
    assert [group.get("sam_step") for group in optimizer.param_groups] == [None if schedule is None else 8]


def make_others() -> tuple[Any, Optimizer, list[Tensor]]:
    """A SAM, and another base optimizer with the same parameters in other groups."""
    first, second = make_params([3, 2])
    optimizer = SAM([{"params": [first], "rho": 0.5}, {"params": [second], "perturb": False}], lr=0.1)
    return optimizer, torch.optim.AdamW([{"params": [second]}, {"params": [first]}]), [first, second]


def test_a_base_optimizer_in_the_place_of_another_keeps_the_options_of_parameters() -> None:
    """Its groups may have another order. One that mixes parameters with different options is refused."""
    optimizer, other, params = make_others()
    optimizer.param_groups[0]["rho"] = 0.7
    optimizer.base_optimizer = other
    params[0].grad = torch.ones(3)
    optimizer.first_step()
    assert [(group["rho"], group["perturb"]) for group in optimizer.param_groups] == [(0.05, False), (0.7, True)]
    optimizer.second_step()
    optimizer.load_state_dict(make_others()[1].state_dict())
    assert [group["perturb"] for group in optimizer.param_groups] == [False, True]
    optimizer.base_optimizer = torch.optim.AdamW(params)
    with pytest.raises(ValueError, match="different rho: keep them apart"):
        optimizer.first_step()


@pytest.mark.parametrize(
    "use",
    [
        lambda optimizer: optimizer.load_state_dict(make_others()[1].state_dict()),
        lambda optimizer: optimizer.add_param_group({"params": make_params([4])}),
        copy.deepcopy,
        SAM.state_dict,
    ],
    ids=["load_state_dict", "add_param_group", "deepcopy", "state_dict"],
)
def test_nothing_needs_a_step_with_a_base_optimizer_in_the_place_of_another(use: Callable[[SAM], Any]) -> None:
    optimizer, optimizer.base_optimizer, _ = make_others()
    found = use(optimizer)
    groups = (found if isinstance(found, SAM) else optimizer).param_groups
    assert [group["perturb"] for group in groups][:2] == [False, True]


def test_a_copy_with_a_base_optimizer_of_its_own_leaves_the_options_of_the_first_one() -> None:
    optimizer, other, params = make_others()
    twin = copy.copy(optimizer)
    twin.base_optimizer = other
    twin.state_dict()
    optimizer.load_state_dict(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1).state_dict())
    assert [group["perturb"] for group in optimizer.param_groups] == [True, False]
    assert [group["perturb"] for group in twin.param_groups] == [False, True]
