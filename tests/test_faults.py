"""An exception at every boundary of a step: each call that the package makes or that is made into it fails once, on
entry and on return.

``SAM_FAST_HYPOTHESIS=nightly`` takes every boundary, as it takes more cases in test_properties.py; by default it is one
in 13, others in each test.

The calls are not listed anywhere. A first run counts them (``sys.setprofile`` sees calls and returns of Python and
native functions), and for each of them the same run is made again and interrupted there. What must then hold: no weight
is left at ``w + e`` once ``restore()`` has been called, every weight is w or what the base optimizer makes of it, and
the optimizer goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from boundaries import Boundaries
from cases import SmallNet, batches, make_params, normal, same_bits, same_step, values
from torch import nn
from torch.nn.functional import cross_entropy

from sam_fast import SAM, Schedule, TrainStep, norm_layers_only

STRIDE = 1 if os.environ.get("SAM_FAST_HYPOTHESIS") == "nightly" else 13


def interruptions(run: Callable[[Boundaries], Any]) -> Iterator[Boundaries]:
    """Runs once to count, then yields one interruption for each boundary; the errors take turns."""
    counting = Boundaries()
    run(counting)
    assert counting.crossed >= 30
    errors = cycle([KeyboardInterrupt, MemoryError, RuntimeError, GeneratorExit])
    for fail_at, error in zip(range(counting.crossed % STRIDE, counting.crossed, STRIDE), errors, strict=False):
        yield Boundaries(fail_at, error)


class Case:
    """Two buckets, two groups, a parameter that is not perturbed and one without a gradient, after one whole step if it
    ``began``.
    """

    def __init__(
        self, base: type[torch.optim.Optimizer], backend: str, flatten: bool, began: bool = True, **options: Any
    ) -> None:
        self.params = [*make_params([130, 7], grads=False), *make_params([33, 20], torch.float64, seed=1, grads=False)]
        groups = [
            {"params": self.params[:1]},
            {"params": self.params[1:2], "perturb": False},
            {"params": self.params[2:]},
        ]
        self.options = options
        self.optimizer = SAM(groups, base, lr=0.1, rho=0.5, backend=backend, flatten=flatten, **options)
        self.optimizer.zero_grad()  # imports what PyTorch imports late, before anything is counted
        if began:
            self.give(1)
            self.optimizer.first_step()
            self.give(2)
            self.optimizer.second_step()
        self.give(3)
        self.params[3].grad = None
        self.began = values(self.params)

    def give(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.params:
            p.grad = normal(p.shape, generator).to(p.dtype)

    def goes_on(self) -> None:
        """A whole step from here is the base optimizer's own."""
        began, base = values(self.params), type(self.optimizer.base_optimizer)
        self.give(5)
        self.optimizer.first_step()
        assert not same_bits(self.params[:1], began[:1])
        self.optimizer.restore()
        assert same_bits(self.params, began)
        self.optimizer.first_step()
        self.give(6)
        own = [nn.Parameter(w) for w in began]
        plain = base(own, lr=0.1, **self.options)
        for p, twin in zip(self.params, own, strict=True):
            twin.grad = p.grad.detach().clone()  # type: ignore[union-attr]
            plain.state[twin] = {
                k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in self.optimizer.state[p].items()
            }
        plain.step()
        self.optimizer.second_step()
        assert same_step(base, self.params, own)


@pytest.mark.guarantee(id="first-step-interrupted")
@pytest.mark.parametrize(("backend", "flatten"), [("cpu", False), ("cpu", True), ("torch", False)])
def test_first_step_interrupted_anywhere(backend: str, flatten: bool) -> None:
    def fresh() -> Case:
        return Case(torch.optim.SGD, backend, flatten, momentum=0.9)

    def counted(boundary: Boundaries) -> None:
        case = fresh()
        boundary.run(lambda: case.optimizer.first_step(zero_grad=True))

    for boundary in interruptions(counted):
        case = fresh()
        done = boundary.run(lambda case=case: case.optimizer.first_step(zero_grad=True))
        if not case.optimizer.perturbed:
            assert same_bits(case.params, case.began), boundary.failed
        elif not done:
            # Only after perturb was complete: in zero_grad, or where the call returns.
            assert not same_bits(case.params[:1], case.began[:1]), boundary.failed
        case.optimizer.restore()
        assert same_bits(case.params, case.began), boundary.failed
        case.goes_on()


@pytest.mark.guarantee(id="second-step-interrupted")
@pytest.mark.parametrize(
    ("base", "options", "backend", "flatten", "began"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, "cpu", False, True),
        (torch.optim.SGD, {"momentum": 0.9}, "cpu", False, False),
        (torch.optim.SGD, {"momentum": 0.9}, "cpu", True, True),
        (torch.optim.SGD, {"momentum": 0.9}, "torch", False, True),
        (torch.optim.SGD, {"momentum": 0.9}, "torch", True, True),
        (torch.optim.AdamW, {}, "torch", False, True),
        (torch.optim.AdamW, {}, "cpu", False, True),
        (torch.optim.AdamW, {}, "cpu", False, False),
        (torch.optim.RMSprop, {}, "cpu", True, True),  # restore, then the base optimizer's step
        (torch.optim.RMSprop, {}, "torch", False, True),
    ],
)
def test_second_step_interrupted_anywhere(
    base: type[torch.optim.Optimizer], options: dict[str, Any], backend: str, flatten: bool, began: bool
) -> None:
    def perturbed() -> Case:
        case = Case(base, backend, flatten, began, **options)
        case.optimizer.first_step()
        case.give(4)
        return case

    undisturbed = perturbed()
    undisturbed.optimizer.second_step(zero_grad=True)

    def counted(boundary: Boundaries) -> None:
        case = perturbed()
        boundary.run(lambda: case.optimizer.second_step(zero_grad=True))

    for boundary in interruptions(counted):
        case = perturbed()
        boundary.run(lambda case=case: case.optimizer.second_step(zero_grad=True))
        case.optimizer.restore()
        assert not case.optimizer.perturbed
        for p, w, new in zip(case.params, case.began, values(undisturbed.params), strict=True):
            assert same_bits([p], [w]) or same_bits([p], [new]), boundary.failed
        case.goes_on()


@pytest.mark.guarantee(id="restore-interrupted")
def test_restore_interrupted_anywhere(flatten: bool) -> None:
    for backend in ("cpu", "torch"):

        def perturbed(backend: str = backend) -> Case:
            case = Case(torch.optim.SGD, backend, flatten)
            case.optimizer.first_step()
            return case

        for boundary in interruptions(lambda b: b.run(perturbed().optimizer.restore)):
            case = perturbed()
            boundary.run(case.optimizer.restore)
            case.optimizer.restore()
            assert not case.optimizer.perturbed
            assert same_bits(case.params, case.began), boundary.failed


@pytest.mark.guarantee(id="restore-after-errors")
def test_second_pass_interrupted_anywhere() -> None:
    """On the way in, in the model, on the way out: the weights come back.

    Statistics too, unless it is putting them back that is interrupted.
    """
    model = SmallNet()
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9)
    ((x, y),) = batches(1)
    before = values(list(model.parameters()))

    def first() -> None:
        optimizer.zero_grad()
        with optimizer.first_pass(model, replay_rng=True):
            cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)

    def second() -> None:
        with optimizer.second_pass(model):
            cross_entropy(model(x), y).backward()

    def counted(boundary: Boundaries) -> None:
        first()
        boundary.run(second)
        optimizer.restore()

    for boundary in interruptions(counted):
        first()
        statistics = [b.clone() for b in model.buffers()]
        done = boundary.run(second)
        optimizer.restore()
        assert same_bits(list(model.parameters()), before), boundary.failed
        where = ("restore", "frozen_running_stats", "second_pass", "exit", "is_", "_put_back", "_look_up")
        putting_back = any(name in boundary.failed for name in where)
        if done or not putting_back:
            assert same_bits(list(model.buffers()), statistics), boundary.failed


@pytest.mark.guarantee(id="restore-after-errors")
def test_closure_interrupted_anywhere() -> None:
    def closure(case: Case) -> Callable[[], float]:
        def call() -> float:
            case.give(4)
            return 1.0

        return call

    def step(case: Case) -> Callable[[], Any]:
        case.optimizer.zero_grad()
        return lambda: case.optimizer.step(closure(case), replay_rng=True)

    undisturbed = Case(torch.optim.SGD, "cpu", False, momentum=0.9)
    step(undisturbed)()
    for boundary in interruptions(lambda b: b.run(step(Case(torch.optim.SGD, "cpu", False, momentum=0.9)))):
        case = Case(torch.optim.SGD, "cpu", False, momentum=0.9)
        boundary.run(step(case))
        case.optimizer.restore()
        for p, w, new in zip(case.params, case.began, values(undisturbed.params), strict=True):
            assert same_bits([p], [w]) or same_bits([p], [new]), boundary.failed


@pytest.mark.parametrize(
    ("base", "perturbs"), [(torch.optim.SGD, True), (torch.optim.SGD, False), (torch.optim.RMSprop, False)]
)
@pytest.mark.guarantee(id="train-step-interrupted")
def test_train_step_interrupted_anywhere(base: type[torch.optim.Optimizer], perturbs: bool) -> None:
    """w or what the step makes of it, no gradients, every parameter trained as before, and the next step goes on."""

    class Training:
        def __init__(self) -> None:
            torch.manual_seed(1)
            self.model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
            self.params = list(self.model.parameters())
            self.params[-1].requires_grad_(False)
            groups = norm_layers_only(self.model, rho=0.5, lr=0.1)
            self.sam = SAM(groups, base, schedule=None if perturbs else Schedule(start=9))
            self.step = TrainStep(
                self.model, self.sam, lambda m, x, y: cross_entropy(m(x), y), ascent=0.5, clip_grad_norm=1.0
            )
            self.step(*batch)

    batch = torch.randn(8, 4), torch.randint(0, 2, (8,))
    undisturbed = Training()
    undisturbed.step(*batch)
    after = values(undisturbed.params)
    trained = [p.requires_grad for p in undisturbed.params]

    def counted(boundary: Boundaries) -> None:
        training = Training()
        boundary.run(lambda: training.step(*batch))

    for boundary in interruptions(counted):
        training = Training()
        began = values(training.params)
        done = boundary.run(lambda training=training: training.step(*batch))
        assert not training.sam.perturbed, boundary.failed
        assert done or all(p.grad is None for p in training.params), boundary.failed
        assert [p.requires_grad for p in training.params] == trained, boundary.failed
        for p, w, new in zip(training.params, began, after, strict=True):
            assert same_bits([p], [w]) or same_bits([p], [new]), boundary.failed
        training.step(*batch)
        assert not same_bits(training.params, began)


# ---- Planted values, and weights moved behind the optimizer's back ---------------------------------------------------


@pytest.mark.guarantee(id="non-finite-gradients")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_anywhere(value: float, backend: str, flatten: bool) -> None:
    """In the first, middle or last element of the first, middle or last parameter: w stays, and the step is the base
    optimizer's own.
    """
    for index in range(3):
        for element in (0, 500, 1008):
            params = make_params([1009, 1009, 1009])
            optimizer = SAM(params, lr=0.1, momentum=0.9, backend=backend, flatten=flatten)
            before, own = values(params), [nn.Parameter(w) for w in values(params)]
            params[index].grad[element] = value  # type: ignore[index]
            optimizer.first_step()
            assert not torch.isfinite(optimizer.grad_norm)
            assert same_bits(params, before)
            plain = torch.optim.SGD(own, lr=0.1, momentum=0.9)
            generator = torch.Generator().manual_seed(1)
            for p, twin in zip(params, own, strict=True):
                p.grad = normal(p.shape, generator)
                twin.grad = p.grad.clone()
            optimizer.second_step()
            plain.step()
            assert same_bits(params, own)


class TestStorageResizedToNothing:
    """As sharding wrappers free parameters. The kernels must not get address 0, for a weight or a gradient."""

    @pytest.fixture
    def resized(self, backend: str) -> tuple[list[nn.Parameter], SAM]:
        if backend == "torch":
            pytest.skip("PyTorch's own kernels write to address 0")
        params = make_params([100, 33])
        return params, SAM(params, lr=0.1, backend=backend)

    @pytest.mark.guarantee(id="resized-storage")
    def test_a_weight_before_first_step(self, resized: tuple[list[nn.Parameter], SAM]) -> None:
        params, optimizer = resized
        before = values(params)
        params[1].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="parameter 1 of group 0 has weights without memory"):
            optimizer.first_step()
        assert not optimizer.perturbed
        assert same_bits(params[:1], before[:1])

    @pytest.mark.guarantee(id="resized-storage")
    def test_a_gradient(self, resized: tuple[list[nn.Parameter], SAM]) -> None:
        params, optimizer = resized
        before = values(params)
        params[0].grad.untyped_storage().resize_(0)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="parameter 0 of group 0 has a gradient without memory"):
            optimizer.first_step()
        assert same_bits(params, before)

    @pytest.mark.guarantee(id="resized-storage")
    def test_a_weight_between_the_passes(self, resized: tuple[list[nn.Parameter], SAM]) -> None:
        """The others come back at once, this one when it has memory again."""
        params, optimizer = resized
        before = values(params)
        optimizer.first_step()
        params[1].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="without memory"):
            optimizer.restore()
        assert optimizer.perturbed
        assert same_bits(params[:1], before[:1])
        params[1].untyped_storage().resize_(4 * 33)
        optimizer.restore()
        assert same_bits(params, before)
        assert not optimizer.perturbed


@pytest.mark.guarantee(id="moved-weights")
@pytest.mark.parametrize("how", ["set_", "data", "numpy"])
def test_a_weight_that_shares_other_memory_between_the_passes_comes_back(how: str, backend: str) -> None:
    params = make_params([100])
    optimizer = SAM(params, lr=0.1, backend=backend)
    before = values(params)
    optimizer.first_step()
    other = torch.zeros(100)
    if how == "set_":
        params[0].data.set_(other)
    elif how == "data":
        params[0].data = other
    else:
        params[0].data = torch.from_numpy(other.cpu().numpy())
    optimizer.restore()
    assert same_bits(params, before)
    assert same_bits([other], before) == (how != "set_")
