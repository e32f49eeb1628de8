"""sam_fast.sharpness, against closed forms on quadratics and against plain PyTorch in float64."""

# ruff: noqa: NPY002  # the random numbers of numpy.random itself are meant

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from cases import norm_tolerance, same_bits, values
from quadratic import EIGENVALUES, ROWS, Quadratic, loss_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from sam_fast import SAM
from sam_fast.perturbation import Perturbation
from sam_fast.sharpness import (
    filter_normalized,
    hessian_eigenvalue,
    hessian_trace,
    landscape,
    loss_along,
    random_direction,
    rho_sharpness,
)


class Net(nn.Module):
    """BatchNorm, dropout, attention, a parameter that nothing uses, a frozen one, and two that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3))
        self.unused, self.scale = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x + self.layers[0](x))[None, None]
        return scaled_dot_product_attention(x, x, x)[0, 0] * self.scale


@pytest.fixture
def net() -> Net:
    return Net().double()


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    """The last batch is a smaller one."""
    return [(torch.randn(rows, 6, dtype=torch.float64), torch.randint(3, (rows,))) for rows in (8, 8, 5)]


def stateless(model: nn.Module) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """The trainable parameters, and the loss at others; it changes nothing but the random state."""

    def loss(at: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return cross_entropy(functional_call(model, at | buffers, (x,)), y)

    return {name: p for name, p in model.named_parameters() if p.requires_grad}, loss


def rises(model: nn.Module, parts: Any, rho: float, adaptive: bool = False, eta: float = 0.0) -> Tensor:
    """For each part its rows, L(w) and L(w + e) - L(w)."""
    params, loss_at = stateless(model)
    found = []
    for x, y in parts:
        state = torch.get_rng_state()
        loss = loss_at(params, x, y)
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        t = [p.abs() + eta if adaptive else torch.ones_like(p) for p in params.values()]
        norm = torch.cat([(a * g).flatten() for a, g in zip(t, grads, strict=True)]).norm()
        moved = {n: p + rho * a * a * g / norm for (n, p), a, g in zip(params.items(), t, grads, strict=True)}
        torch.set_rng_state(state)
        found.append([len(x), loss.item(), loss_at(moved, x, y).item() - loss.item()])
    return torch.tensor(found, dtype=torch.float64)


def hessian(model: nn.Module, data: Any) -> Tensor:
    """The whole matrix, of the mean loss over all rows; masks are drawn from the random state as it is."""
    params, loss_at = stateless(model)
    state = torch.get_rng_state()

    def mean(w: Tensor) -> Tensor:
        parts = w.split([p.numel() for p in params.values()])
        at = {name: part.reshape(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            return sum(len(x) * loss_at(at, x, y) for x, y in data) / sum(len(x) for x, _ in data)

    w = torch.cat([p.detach().flatten() for p in params.values()])
    found: Tensor = torch.autograd.functional.hessian(mean, w)  # type: ignore[no-untyped-call]
    torch.set_rng_state(state)
    return found


# ---- Closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_of_a_quadratic(adaptive: bool, backend: str) -> None:
    model = Quadratic(EIGENVALUES)  # on the backend's device
    w = model.w().detach()
    g = model.h @ w + model.b
    t = w.abs() + 0.01 if adaptive else torch.ones_like(w)
    e = 0.1 * t * t * g / (t * g).norm()
    found = rho_sharpness(model, loss_of, ROWS, rho=0.1, adaptive=adaptive, eta=0.01, backend=backend)
    tolerance = norm_tolerance(backend, torch.float64) + 1e-11
    assert found.value == pytest.approx(float(e @ g + e @ model.h @ e / 2), rel=tolerance)
    if not adaptive:
        assert found.value == pytest.approx(float(0.1 * g.norm() + 0.005 * g @ model.h @ g / (g @ g)), rel=tolerance)
    zero, loss = pytest.approx(0.0, abs=1e-15), pytest.approx(float(model.at(w)))
    assert (found.standard_error, found.loss, found.batches) == (zero, loss, 2)


@pytest.mark.parametrize("eigenvalues", [EIGENVALUES, [-9.0, 4.0, 1.0, 0.0, -1.0, 2.0], [-5.0, -4.0, -3.0, -2.0, -1.0]])
def test_largest_eigenvalue_of_a_quadratic(eigenvalues: list[float]) -> None:
    model = Quadratic(eigenvalues)
    found = hessian_eigenvalue(model, loss_of, ROWS, tolerance=1e-6, max_iterations=1000)
    assert found.converged
    assert found.error_bound <= 1e-6 * abs(found.value)
    assert abs(found.value - max(eigenvalues)) <= found.error_bound
    for iterations in (1, 2, 5, 10):
        early = hessian_eigenvalue(model, loss_of, ROWS, tolerance=1e-6, max_iterations=iterations)
        assert (early.iterations, early.converged) == (iterations, False)
        assert min(abs(early.value - of_h) for of_h in eigenvalues) <= early.error_bound


def test_eigenvalues_that_differ_in_sign_alone_are_not_converged() -> None:
    found = hessian_eigenvalue(Quadratic([5.0, -5.0, 1.0, 0.0, -1.0, 2.0]), loss_of, ROWS, max_iterations=1000)
    assert (found.iterations, found.converged) == (1000, False)
    assert -5.0 < found.value < 5.0
    assert 5.0 - abs(found.value) <= found.error_bound


def test_trace_of_a_quadratic() -> None:
    model = Quadratic(EIGENVALUES)
    found = hessian_trace(model, loss_of, ROWS, samples=400)
    assert abs(found.value - sum(EIGENVALUES)) < 4 * found.standard_error
    # The variance of z'Hz is twice the sum of squares off the diagonal. Two batches of 2 and 3 rows have draws of
    # their own. The standard deviation of 400 samples is right to about 4 %.
    variance = 2 * (model.h.square().sum() - model.h.diagonal().square().sum()) * (0.4**2 + 0.6**2)
    assert found.standard_error == pytest.approx(float(variance / 400) ** 0.5, rel=0.2)
    model.h = torch.diag(torch.arange(7.0, dtype=torch.float64))
    exact = hessian_trace(model, loss_of, ROWS, samples=2)
    assert (exact.value, exact.standard_error, exact.samples) == (pytest.approx(21.0), pytest.approx(0.0, abs=1e-12), 2)


def test_a_linear_loss_has_no_curvature() -> None:
    model = Quadratic([0.0] * 6)

    def linear(model: Any, x: Tensor) -> Tensor:
        return model.b @ model.w()

    assert hessian_eigenvalue(model, linear, ROWS).value == hessian_trace(model, linear, ROWS).value == 0.0


def test_line_and_plane_of_a_quadratic() -> None:
    model = Quadratic(EIGENVALUES)
    first, second = random_direction(model, 0), {"vector": torch.ones(3), "matrix": torch.full((2, 2), 0.5)}
    assert set(first) == {"matrix"}  # no biases
    flat = [torch.cat([d["matrix"].flatten(), d.get("vector", torch.zeros(3))]) for d in (first, second)]
    w, steps, others = model.w().detach(), [-1.5, 0.0, 0.25], [0.0, 3.0]
    line = loss_along(model, loss_of, (rows for rows in ROWS), first, steps)
    assert line.steps == tuple(steps)
    assert line.losses == pytest.approx([float(model.at(w + a * flat[0])) for a in steps], rel=1e-12)
    plane = landscape(model, loss_of, ROWS, first, second, steps, others)
    for a, row in zip(plane.steps, plane.losses, strict=True):
        assert row == pytest.approx([float(model.at(w + a * flat[0] + b * flat[1])) for b in others], rel=1e-12)


def test_each_filter_has_the_norm_of_the_models_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[3].weight[1] = 0.0
    direction = random_direction(model, 0)
    assert set(direction) == {"0.weight", "3.weight"}
    for name, p in (("0.weight", model[0].weight), ("3.weight", model[3].weight)):
        torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
    same, other = random_direction(model, 0), random_direction(model, 1)
    assert same_bits(list(direction.values()), list(same.values()))
    assert not torch.equal(direction["0.weight"], other["0.weight"])
    assert not filter_normalized(model, {"0.weight": torch.zeros(4, 3, 2, 2)})["0.weight"].any()
    assert set(random_direction(nn.Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 2)))) == {"1.weight"}


def test_a_direction_of_complex_weights_is_complex() -> None:
    assert random_direction(nn.Linear(3, 2, dtype=torch.cfloat))["weight"].imag.abs().min() > 0


@pytest.mark.parametrize("step", [1e-15, 1e-12, -1e-10])
def test_a_short_step_is_as_long_as_asked(step: float, backend: str) -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    along = {"weight": torch.ones(1, 1)}
    line = loss_along(model, lambda q, x: q.weight.sum(), ROWS, along, [step], backend=backend)
    assert line.losses[0] == pytest.approx(step, rel=norm_tolerance(backend, torch.float64) + 1e-12, abs=0.0)


# ---- A network, against plain PyTorch --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("m", [None, 3])
@pytest.mark.parametrize("options", [{"rho": 0.05}, {"rho": 0.5, "adaptive": True, "eta": 0.01}])
def test_sharpness_of_a_network(net: Net, data: Any, options: Any, m: int | None, training: bool) -> None:
    net.train(training)
    with torch.no_grad():  # wherever it is called
        found = rho_sharpness(net, loss_of, iter(data), m=m, **options)
    by_batch = []
    for x, y in data:
        shards = rises(net, zip(x.split(m or 99), y.split(m or 99), strict=True), **options)
        by_batch.append(shards[:, 0] @ shards[:, 1:] / len(x))
    losses, of_batch = torch.stack(by_batch, dim=1)
    share = torch.tensor([8 / 21, 8 / 21, 5 / 21], dtype=torch.float64)
    mean = share @ of_batch
    error = (share.square() @ (of_batch - mean).square() * 3 / 2) ** 0.5  # of equal batches: their sd / sqrt(3)
    expected = {"value": float(mean), "standard_error": float(error), "loss": float(share @ losses), "batches": 3}
    assert vars(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_hessian_of_a_network(net: Net, data: Any, training: bool) -> None:
    net.train(training)
    whole = hessian(net, data)
    largest = hessian_eigenvalue(net, loss_of, data, tolerance=1e-4, max_iterations=500)
    assert largest.converged
    assert abs(largest.value - float(torch.linalg.eigvalsh(whole)[-1])) <= largest.error_bound
    found = hessian_trace(net, loss_of, data, samples=50)
    assert abs(found.value - float(whole.trace())) < 4 * found.standard_error


def test_a_loader_that_cannot_say_how_long_it_is(net: Net, data: Any) -> None:
    class Loader:
        def __iter__(self) -> Any:
            return iter(data)

        def __len__(self) -> int:
            raise NotImplementedError

    assert rho_sharpness(net, loss_of, Loader(), rho=0.1).batches == 3


def test_one_batch_has_no_standard_error(net: Net, data: Any) -> None:
    found = rho_sharpness(net, loss_of, data[:1], rho=0.1)
    assert (found.batches, found.standard_error != found.standard_error) == (1, True)


def test_every_step_of_a_line_draws_the_same_masks(net: Net, data: Any) -> None:
    line = loss_along(net, loss_of, data, random_direction(net), [0.0, 0.5, 0.0])
    assert line.losses[0] == line.losses[2] != line.losses[1]


# ---- No trace --------------------------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[..., Any]] = {
    "sharpness": partial(rho_sharpness, rho=0.1, m=3),
    "adaptive": partial(rho_sharpness, rho=0.5, adaptive=True),
    "line": lambda model, *a: loss_along(model, *a, random_direction(model), [-1.0, 0.0, 1.0]),
    "plane": lambda model, *a: landscape(model, *a, random_direction(model), random_direction(model, 1), [0.0, 1.0]),
    "eigenvalue": partial(hessian_eigenvalue, max_iterations=3),
    "trace": partial(hessian_trace, samples=2),
}


def pythons_and_numpys() -> Any:
    _, key, position, *_ = numpy.random.get_state()
    return random.getstate(), key.tolist(), position


@pytest.mark.guarantee(id="sharpness")
@pytest.mark.parametrize(("dtype", "flatten"), [(torch.float32, True), (torch.float64, False), (torch.bfloat16, False)])
@pytest.mark.parametrize("fails_at", [None, 1, 2, 3])
@pytest.mark.parametrize("measure", MEASURES)
def test_it_leaves_no_trace(measure: str, fails_at: int | None, dtype: torch.dtype, flatten: bool, data: Any) -> None:
    model = Net().to(dtype)
    _optimizer = SAM(model.parameters(), flatten=flatten)  # gradients are views where it says so
    data = [(x.to(dtype), y) for x, y in data]
    loss_of(model, *data[0]).backward()
    grads = [p.grad for p in model.parameters()]
    everything = [*model.parameters(), *model.buffers(), *(grad for grad in grads if grad is not None)]
    before, random_state, others, calls = values(everything), torch.get_rng_state(), pythons_and_numpys(), 0

    def failing(model: nn.Module, *batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        random.random(), numpy.random.rand()
        if calls == fails_at:
            raise KeyboardInterrupt
        return loss_of(model, *batch)

    with nullcontext() if fails_at is None else pytest.raises(KeyboardInterrupt):
        MEASURES[measure](model, failing, data)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert same_bits(before, values(everything))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert pythons_and_numpys() == others


@pytest.mark.guarantee(id="sharpness")
@pytest.mark.parametrize("measure", MEASURES)
def test_statistics_of_other_modules_are_left_as_they_were(measure: str, net: Net, data: Any) -> None:
    """A generator is measured through its discriminator."""
    other = nn.BatchNorm1d(3).double()
    MEASURES[measure](net, lambda model, x, y: cross_entropy(other(model(x)), y), data)
    assert int(other.num_batches_tracked) == 0


@pytest.mark.parametrize("measure", MEASURES)
def test_the_default_device_says_nothing(measure: str, net: Net, data: Any) -> None:
    """The meta device stands for a GPU, with which no tensor on the host can be mixed either."""
    expected = MEASURES[measure](net, loss_of, data)
    with torch.device("meta"):
        assert MEASURES[measure](net, loss_of, data) == expected


@pytest.mark.parametrize("measure", MEASURES)
def test_a_loader_with_a_generator_of_its_own_goes_on_as_if_nothing_had_been_measured(measure: str) -> None:
    rows = TensorDataset(torch.randn(12, 6), torch.randint(3, (12,)))
    shuffles = torch.Generator().manual_seed(1)
    loader = DataLoader(rows, batch_size=6, shuffle=True, generator=shuffles)
    sampled = DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows, generator=shuffles), 6, False))
    for batches in (loader, sampled):
        before = shuffles.get_state()
        MEASURES[measure](Net(), loss_of, batches)
        assert torch.equal(shuffles.get_state(), before)


class Noisy(Dataset[Any]):
    """Augmented by the workers."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return torch.randn(6), index % 3


@pytest.mark.parametrize("measured_in", [None, 0, 1])
def test_persistent_workers_go_on_as_if_nothing_had_been_measured(measured_in: int | None) -> None:
    """Whether in the middle of the first epoch or of the second."""
    runs = []
    for measures in (False, True):
        torch.manual_seed(0)
        loader, seen = DataLoader(Noisy(), batch_size=4, num_workers=1, persistent_workers=True), []
        if measures and measured_in is None:
            rho_sharpness(Net(), loss_of, loader, rho=0.1)
        torch.manual_seed(1)
        for epoch in range(2):
            for number, (x, _) in enumerate(loader):
                seen.append(x)
                if measures and epoch == measured_in and number == 1:
                    rho_sharpness(Net(), loss_of, loader, rho=0.1)
        runs.append(torch.stack(seen))
    assert torch.equal(*runs)


def test_an_interrupted_restore_is_done_again(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    model, restore = nn.Linear(6, 3).double(), Perturbation.restore
    calls: list[Perturbation] = []
    before = values(list(model.parameters()))

    def interrupted(self: Perturbation) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        restore(self)

    monkeypatch.setattr(Perturbation, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rho_sharpness(model, loss_of, data, rho=0.1)
    assert same_bits(before, values(list(model.parameters())))
