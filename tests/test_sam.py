"""Corners of a step: memory exchanged, gradients already used, closures that raise, random state that outlives its
step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import SmallNet, make_params, same_bits, values
from torch import Tensor, nn

from sam_fast import SAM

Make = Callable[..., SAM]


@pytest.fixture
def make(backend: str, flatten: bool) -> Make:
    """Makes a SAM on the backend under test; with lr=0, so that a whole step must end where it began."""
    return lambda params, *args, **options: SAM(
        params, *args, **{"lr": 0.0, "backend": backend, "flatten": flatten, **options}
    )


def with_gradients(params: list[nn.Parameter]) -> list[nn.Parameter]:
    for p in params:
        p.grad = torch.randn_like(p)
    return params


# ---- Weights that get other memory between the passes ----------------------------------------------------------------


@pytest.mark.guarantee(id="moved-weights")
def test_weights_given_other_memory_between_the_passes_come_back(make: Make) -> None:
    params = make_params([100, 20_000])
    optimizer = make(params, rho=0.1)
    before = values(params)
    optimizer.first_step()
    for p in params:
        p.data = p.data.clone()
    optimizer.second_step()
    assert same_bits(values(params), before)


@pytest.mark.guarantee(id="taken-memory")
def test_memory_taken_from_a_parameter_between_the_passes_is_not_written(backend: str) -> None:
    """It may be in use elsewhere by now. (With flatten=True it is the optimizer's own.)"""
    params = make_params([100, 20_000])
    optimizer = SAM(params, lr=0.0, rho=0.1, backend=backend)
    optimizer.first_step()
    old = [p.data for p in params]
    for p in params:
        p.data = p.data.clone()
    kept = values(old)
    optimizer.restore()
    assert same_bits(old, kept)


@pytest.mark.guarantee(id="moved-weights")
def test_a_model_made_double_between_the_passes_comes_back(make: Make) -> None:
    """Every float32 is a float64, so this conversion loses no bit."""
    model = SmallNet()
    params = with_gradients(list(model.parameters()))
    optimizer = make(params, rho=0.1)
    before = [p.detach().double() for p in params]
    optimizer.first_step()
    model.double()
    optimizer.restore()
    assert same_bits(values(params), before)


def test_a_layout_changed_between_the_passes_comes_back(make: Make) -> None:
    p = with_gradients([nn.Parameter(torch.randn(2, 3, 4, 5))])[0]
    optimizer = make([p], rho=0.1)
    before = values([p])
    optimizer.first_step()
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    optimizer.restore()
    assert same_bits(values([p]), before)


@pytest.mark.guarantee(id="changed-shape")
def test_a_shape_changed_between_the_passes_is_an_error_and_the_others_come_back(make: Make) -> None:
    params = make_params([10, 20])
    optimizer = make(params)
    before = values(params)
    optimizer.first_step()
    params[0].data = torch.zeros(5)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 cannot be restored: its shape changed"):
        optimizer.restore()
    assert not optimizer.perturbed
    assert same_bits(values(params[1:]), before[1:])


# ---- Norms at the edge -----------------------------------------------------------------------------------------------


SUBNORMAL = pytest.param(
    1e-42,
    marks=pytest.mark.xfail(
        strict=True,
        reason="known limit (docs/guarantees.md, asam-range): rho / n is at most float32's largest, e is shorter",
    ),
    id="1e-42",
)


@pytest.mark.parametrize("size", [SUBNORMAL, 1e-30, 1.0, 1e30], ids=str)
def test_the_perturbation_is_rho_long_however_large_the_gradient(make: Make, size: float) -> None:
    """From 0, so that w + e has no rounding of its own: what is left is float32's 6e-8 in the gradient, the scale and
    their product.
    """
    p = nn.Parameter(torch.zeros(5000))
    p.grad = torch.full((5000,), size)
    optimizer = make([p], rho=0.05, perturb_eps=0.0)
    optimizer.first_step()
    assert float(p.detach().double().norm()) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.guarantee(id="non-finite-gradients")
@pytest.mark.parametrize("index", [0, 1])
def test_non_finite_in_one_dtype_moves_no_other_dtype(make: Make, index: int) -> None:
    params = [*make_params([100, 50]), *make_params([100], torch.float64), *make_params([100], torch.bfloat16)]
    params[3 * index].grad[-1] = float("nan")  # type: ignore[index]
    optimizer = make(params)
    before = values(params)
    optimizer.first_step()
    assert same_bits(values(params), before)
    optimizer.second_step()
    assert same_bits(values(params[1:3]), before[1:3])


@pytest.mark.guarantee(id="perturb-false")
def test_non_finite_in_an_unperturbed_group_does_not_matter(make: Make) -> None:
    params = make_params([10, 20])
    params[1].grad.fill_(float("nan"))  # type: ignore[union-attr]
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "perturb": False}])
    before = values(params)
    optimizer.first_step()
    assert float(optimizer.grad_norm) == pytest.approx(float(params[0].grad.double().norm()), rel=1e-6)  # type: ignore[union-attr]
    assert not same_bits(values(params[:1]), before[:1])


def test_sparse_gradients_in_an_unperturbed_group_work_as_the_error_message_promises(make: Make) -> None:
    embedding, head = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 1)
    optimizer = make([{"params": head.parameters()}, {"params": embedding.parameters(), "perturb": False}], lr=0.1)
    before = values([embedding.weight])[0]
    for call in (optimizer.first_step, optimizer.second_step) * 2:
        head(embedding(torch.tensor([1, 2]))).sum().backward()
        call(zero_grad=True)
    changed = (embedding.weight.detach() != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [1, 2]


# ---- Hooks -----------------------------------------------------------------------------------------------------------


def test_pre_hooks_see_the_perturbed_weights_and_post_hooks_the_new_ones(make: Make) -> None:
    params = make_params([10])
    optimizer, seen = make(params), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append((o.perturbed, values(params)[0])))
    optimizer.register_step_post_hook(lambda o, *_: seen.append((o.perturbed, values(params)[0])))
    before = values(params)[0]
    optimizer.first_step()
    moved = values(params)[0]
    optimizer.second_step()
    assert [perturbed for perturbed, _ in seen] == [True, False]
    assert same_bits([w for _, w in seen], [moved, before])


# ---- Closures --------------------------------------------------------------------------------------------------------


class Square:
    """A closure: the sum of squares. Raises in the given call, after its backward."""

    def __init__(self, params: list[nn.Parameter], raises: int = 0) -> None:
        self.params, self.raises, self.calls = params, raises, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        loss: Tensor = sum((p * p).sum() for p in self.params)  # type: ignore[assignment]
        loss.backward()
        if self.calls == self.raises:
            raise RuntimeError("closure failed")
        return loss.detach()


def test_the_closure_computes_its_two_losses_at_w_and_above(make: Make) -> None:
    """f = |w|^2 and e = rho w/|w|, so that the second loss is (|w| + rho)^2; the first one is returned."""
    p = nn.Parameter(torch.full((4,), 0.5))
    losses: list[float] = []
    square = Square([p])

    def closure() -> Tensor:
        loss = square()
        losses.append(float(loss))
        return loss

    assert float(make([p], rho=0.1).step(closure)) == losses[0]
    assert losses == pytest.approx([1.0, 1.21], rel=1e-6)


def test_what_the_closure_returns_is_returned_as_it_is(make: Make) -> None:
    params, token = make_params([3], grads=False), object()
    optimizer, square = make(params), Square(params)

    def closure() -> object:
        square()
        return token

    assert optimizer.step(closure) is token
    square()
    assert optimizer.step(closure=closure) is token


@pytest.mark.xfail(
    strict=True,
    reason="known limit (docs/guide.md, Closures): marking them in second_step would cost Python for each parameter",
)
def test_gradients_that_second_step_has_used_are_no_first_pass(make: Make) -> None:
    """A two-call step without zero_grad, then a closure."""
    params = make_params([3, 4], grads=False)
    optimizer, square = make(params), Square(params)
    square()
    optimizer.first_step(zero_grad=True)
    square()
    optimizer.second_step()
    closure = Square(params)
    optimizer.step(closure)
    assert closure.calls == 2


@pytest.mark.parametrize("raises", [1, 2], ids=["first-pass", "second-pass"])
def test_gradients_of_a_closure_that_raised_are_no_first_pass_of_the_next_batch(make: Make, raises: int) -> None:
    params = make_params([3, 4], grads=False)
    optimizer = make(params)
    with pytest.raises(RuntimeError, match="closure failed"):
        optimizer.step(Square(params, raises))
    closure = Square(params)
    optimizer.step(closure)
    assert closure.calls == 2


@pytest.mark.parametrize("raises", [1, 2], ids=["first-pass", "second-pass"])
def test_an_optimizer_whose_closure_raised_goes_on_after_zero_grad(make: Make, raises: int) -> None:
    params, twins = make_params([3, 4], grads=False), make_params([3, 4], grads=False)
    optimizer, other = make(params, lr=0.1, momentum=0.9), make(twins, lr=0.1, momentum=0.9)
    with pytest.raises(RuntimeError, match="closure failed"):
        optimizer.step(Square(params, raises))
    optimizer.zero_grad()
    optimizer.step(Square(params))
    other.step(Square(twins))
    assert same_bits(params, twins)


# ---- Random state and gradient synchronisation -----------------------------------------------------------------------


def mask(model: nn.Module) -> Tensor:
    out: Tensor = model(torch.ones(4, 20))
    out.sum().backward()
    return out == 0


@pytest.fixture
def dropping() -> tuple[nn.Module, SAM]:
    model = nn.Sequential(nn.Linear(20, 50), nn.Dropout(0.5))
    return model, SAM(model.parameters(), lr=0.1)


def test_the_random_state_of_a_first_pass_that_raised_is_not_replayed(dropping: tuple[nn.Module, SAM]) -> None:
    """The next step did not ask for a replay: its second pass draws new masks, not those of the abandoned pass."""
    model, optimizer = dropping
    with contextlib.suppress(ZeroDivisionError), optimizer.first_pass(model, replay_rng=True):
        given_up = mask(model)
        raise ZeroDivisionError
    optimizer.zero_grad()
    mask(model)
    optimizer.first_step(zero_grad=True)
    with optimizer.second_pass(model):
        assert not torch.equal(mask(model), given_up)


def test_the_stream_goes_on_when_a_replayed_second_pass_raises(dropping: tuple[nn.Module, SAM]) -> None:
    model, optimizer = dropping
    with optimizer.first_pass(model, replay_rng=True):
        mask(model)
    optimizer.first_step(zero_grad=True)
    torch.rand(7)  # else the second pass would end where the first one did
    state = torch.get_rng_state()
    with contextlib.suppress(ZeroDivisionError), optimizer.second_pass(model):
        mask(model)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)


class SyncSwitch(nn.Linear):
    """A stub with the switch of FSDP2."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.events: list[bool] = []

    def set_requires_gradient_sync(self, value: bool) -> None:
        self.events.append(value)


class NoSync(nn.Linear):
    """A stub with the context manager of DDP."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.events: list[bool] = []

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.events.append(False)
        try:
            yield
        finally:
            self.events.append(True)


@pytest.mark.parametrize("stub", [SyncSwitch, NoSync])
@pytest.mark.parametrize("raises", [False, True], ids=["", "raises"])
def test_synchronisation_is_off_inside_first_pass_and_on_again_after(stub: Callable[[], Any], raises: bool) -> None:
    model = stub()
    optimizer = SAM(model.parameters(), lr=0.1)
    with contextlib.suppress(ZeroDivisionError), optimizer.first_pass(model, sync=False):
        assert model.events == [False]
        if raises:
            raise ZeroDivisionError
    assert model.events == [False, True]
