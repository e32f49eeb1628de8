"""TrainStep against the loop written by hand, and unwrap."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from plain_sam import furthest
from torch import nn
from torch.nn.functional import cross_entropy

from sam_fast import SAM, Schedule, TrainStep, unwrap
from sam_fast.sharpness import rho_sharpness

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "rho": 0.1}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def batches(number: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(12, 5, generator=generator), torch.randint(0, 3, (12,), generator=generator))] * number


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(x), y)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.guarantee(id="train-step")
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, lambda: torch.autocast("cpu", torch.bfloat16), nullcontext])
@pytest.mark.parametrize("scaled", [False, True])
def test_it_is_the_loop_written_by_hand(every: int, autocast: Any, scaled: bool, flatten: bool) -> None:
    by_hand, by_step = network(), network()
    optimizer = SAM(by_hand.parameters(), flatten=flatten, **OPTIONS)
    sam = SAM(by_step.parameters(), flatten=flatten, **OPTIONS)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled) for _ in range(2)]
    replay = every == 1
    step = TrainStep(
        by_step, sam, loss_of, ascent=1 / every, autocast=autocast, scaler=scalers[0] if scaled else None,
        replay_rng=replay,
    )  # fmt: skip

    def loss_by_hand(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast not in (None, nullcontext)):
            return loss_of(by_hand, x, y)

    for x, y in batches():
        state = torch.get_rng_state()
        with optimizer.first_pass(by_hand, replay_rng=replay):
            first = loss_by_hand(x[::every], y[::every])
            scalers[1].scale(first).backward()
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(by_hand):
            second = loss_by_hand(x, y)
            scalers[1].scale(second).backward()
        scalers[1].step(optimizer)
        scalers[1].update()
        optimizer.zero_grad()
        torch.set_rng_state(state)
        result = step(x, y)
        assert same(by_hand, by_step)
        assert torch.equal(result.loss, first if every == 1 else second)
        if every == 1:
            assert result.sharpness is not None
            assert torch.equal(result.sharpness, (second - first).detach())
        else:
            assert result.sharpness is None
        assert result.grad_norm is not None
        assert torch.equal(result.grad_norm * (8.0 if scaled else 1.0), optimizer.grad_norm)


@pytest.mark.parametrize("micro_batches", [2, 5, 12, 40])
@pytest.mark.parametrize("ascent", [1.0, 0.25])
def test_micro_batches_accumulate_the_whole_batch(micro_batches: int, ascent: float) -> None:
    whole, parts = (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    steps = [
        TrainStep(model, SAM(model.parameters(), **OPTIONS), loss_of, ascent=ascent, micro_batches=n)
        for model, n in ((whole, 1), (parts, micro_batches))
    ]
    for x, y in batches():
        results = [step(x.double(), y) for step in steps]
        torch.testing.assert_close(results[0].loss, results[1].loss)
        torch.testing.assert_close(results[0].grad_norm, results[1].grad_norm)
    assert furthest(whole.parameters(), parts.parameters()) < 1e-12


def test_unperturbed_steps_make_one_pass() -> None:
    model, rows = network(), []

    def counted(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return loss_of(model, x, y)

    step = TrainStep(model, SAM(model.parameters(), schedule=Schedule(every=3), **OPTIONS), counted, ascent=0.5)
    results = [step(x, y) for x, y in batches(4)]
    assert rows == [6, 12, 12, 12, 6, 12]
    assert [r.grad_norm is None for r in results] == [False, True, True, False]


@pytest.mark.parametrize("schedule", [None, Schedule(every=2)])
def test_statistics_of_other_modules_count_once_too(schedule: Schedule | None) -> None:
    """A generator is trained through its discriminator."""
    generator, discriminator = nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    step = TrainStep(
        generator,
        SAM(generator.parameters(), schedule=schedule),
        lambda generator, z: discriminator(generator(z)).square().mean(),
    )
    for count in range(1, 4):
        step(torch.randn(8, 4))
        assert int(discriminator[1].num_batches_tracked) == count


@pytest.mark.parametrize("perturbs", [True, False])
def test_gradients_are_zeroed_once_per_pass(perturbs: bool) -> None:
    """With flatten=True each time is a memset. What somebody left behind between steps costs another."""
    model = network()
    schedule = None if perturbs else Schedule(start=100)
    sam = SAM(model.parameters(), flatten=True, schedule=schedule, **OPTIONS)
    step = TrainStep(model, sam, loss_of)
    (x, y), *_ = batches()
    step(x, y)
    with mock.patch.object(sam._perturbation, "zero_grad", wraps=sam._perturbation.zero_grad) as zeroed:
        step(x, y)
        assert zeroed.call_count == (2 if perturbs else 1)
        loss_of(model, x, y).backward()
        step(x, y)
        assert zeroed.call_count == (5 if perturbs else 3)
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_steps_of_another_loop_leave_no_gradients_behind(flatten: bool) -> None:
    """Those of a step with a closure are not zero, and not new."""
    found = []
    for leaves in (False, True):
        model = network()
        sam = SAM(model.parameters(), flatten=flatten, closure="both", lr=0.0, rho=0.1)
        (x, y), *_ = batches()
        step = TrainStep(model, sam, loss_of)
        step(x, y)

        def closure(model: nn.Module = model, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        if leaves:
            sam.step(closure)
        model[3].eval()
        result = step(x, y)
        assert result.grad_norm is not None
        found.append(result.grad_norm)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("fails_in", [1, 2])
def test_whatever_raises_the_weights_come_back_and_no_gradient_stays(fails_in: int, flatten: bool) -> None:
    model, calls = network(), []
    before = copy.deepcopy([p.detach() for p in model.parameters()])

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == fails_in:
            loss_of(model, x, y).backward()
            raise ZeroDivisionError
        return loss_of(model, x, y)

    sam = SAM(model.parameters(), flatten=flatten, **OPTIONS)
    step = TrainStep(model, sam, loss)
    (x, y), *_ = batches()
    with pytest.raises(ZeroDivisionError):
        step(x, y)
    assert furthest(model.parameters(), before) == 0.0
    assert not sam.perturbed
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    step(x, y)
    assert furthest(model.parameters(), before) > 0.0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ascent": 0.0}, "ascent"),
        ({"ascent": 1.5}, "ascent"),
        ({"ascent": True}, "ascent"),
        ({"micro_batches": 0}, "micro_batches"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm"),
        ({"ascent": 0.5, "replay_rng": True}, "replay_rng"),
        ({"scaler": torch.amp.GradScaler("cpu"), "backward": torch.Tensor.backward}, "scaler and backward"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], text: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=text):
        TrainStep(model, SAM(model.parameters()), loss_of, **options)
    with pytest.raises(TypeError, match=r"^optimizer must be a sam_fast\.SAM .* got SGD: SAM\(optimizer\) makes one"):
        TrainStep(model, torch.optim.SGD(model.parameters()), loss_of)
    with pytest.raises(ValueError, match=r"loss_fn must return one number, a mean, got shape \(12,\)"):
        TrainStep(model, SAM(model.parameters()), lambda m, x, y: cross_entropy(m(x), y, reduction="none"))(
            *batches()[0]
        )
    one = TrainStep(model, SAM(model.parameters()), lambda m, x, y: loss_of(m, x, y)[None])(*batches()[0])
    assert one.loss.shape == one.sharpness.shape == ()
    with pytest.raises(TypeError, match="tuple"):
        TrainStep(model, SAM(model.parameters()), lambda m, x, y: (loss_of(m, x, y), x))(*batches()[0])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ascent", None),
        ("ascent", "0.5"),
        ("autocast", "bf16"),
        ("autocast", True),
        ("autocast", contextmanager(lambda: iter([None]))()),
        ("micro_batches", True),
        ("clip_grad_norm", True),
        ("scaler", 1024.0),
        ("backward", True),
        ("replay_rng", "no"),
        ("sync", "False"),
        ("model", SAM),
        ("loss_fn", nn.MSELoss()),
        ("loss_fn", torch.zeros(())),
    ],
)
def test_an_argument_of_another_kind_is_named(option: str, value: Any) -> None:
    model = network()
    given = {"model": model, "optimizer": SAM(model.parameters()), "loss_fn": loss_of, option: value}
    with pytest.raises((TypeError, ValueError), match=f"{option} must be"):
        TrainStep(**given)


class OfModel(nn.CrossEntropyLoss):
    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(model(x), y)


def test_a_loss_derived_from_pytorchs_may_take_the_model() -> None:
    model = network()
    x, y = batches()[0]
    assert TrainStep(model, SAM(model.parameters(), **OPTIONS), OfModel())(x, y).loss.isfinite()
    assert rho_sharpness(model, OfModel(), [(x, y)], rho=0.05).value > 0.0


@pytest.mark.parametrize("kind", ["packed", "sparse", "nested"])
def test_what_has_no_rows_to_be_cut_at_is_taken_whole_or_refused(kind: str) -> None:
    rows = [torch.randn(4) for _ in range(6)]
    batch: Any = {
        "packed": lambda: nn.utils.rnn.pack_sequence([torch.randn(n, 4) for n in (3, 2, 1)]),
        "sparse": lambda: torch.stack(rows).to_sparse(),
        "nested": lambda: torch.nested.nested_tensor(rows, layout=torch.jagged),
    }[kind]()
    model = nn.Linear(4, 2)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        values = {"packed": lambda: batch.data, "sparse": lambda: batch.to_dense(), "nested": lambda: batch.values()}
        return model(values[kind]().reshape(-1, 4)).square().mean()

    sam = SAM(model.parameters())
    before = copy.deepcopy(list(model.parameters()))
    for options in ({"ascent": 0.5}, {"micro_batches": 2}):
        with pytest.raises(TypeError, match="cannot be cut into rows"):
            TrainStep(model, sam, loss, **options)(batch)
        assert furthest(model.parameters(), before) == 0.0
    TrainStep(model, sam, loss)(batch)
    assert furthest(model.parameters(), before) > 0.0


# ---- unwrap ----------------------------------------------------------------------------------------------------------


class Wrapper:
    def __init__(self, optimizer: Any, name: str) -> None:
        setattr(self, name, optimizer)


def test_a_sam_with_an_attribute_called_as_wrappers_call_theirs_is_found() -> None:
    class Variant(SAM):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            self.opt = {"alpha": 0.4}

    variant = Variant(nn.Linear(2, 1).parameters(), lr=0.1)
    assert unwrap(variant) is variant
    assert unwrap([variant]) is variant


def test_unwrap_finds_the_sam_inside() -> None:
    sam = SAM(network().parameters())
    assert unwrap(sam) is sam
    for name in ("optimizer", "_optimizer"):
        wrapped = Wrapper(Wrapper(sam, name), "optimizer")
        assert unwrap(wrapped) is sam
        assert unwrap([wrapped]) is sam
    with pytest.raises(TypeError, match="list with 2"):
        unwrap([sam, sam])
    with pytest.raises(TypeError, match="SGD"):
        unwrap(torch.optim.SGD(network().parameters()))
    with pytest.raises(TypeError, match="NoneType"):
        unwrap(None)
    one = Wrapper(Wrapper(None, "opt"), "optimizer")
    one.optimizer.opt = one
    with pytest.raises(TypeError, match="Wrapper"):
        unwrap(one)


def test_an_optimizer_of_other_parameters_is_warned_of_once() -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randint(2, (4,))
    step = TrainStep(copy.deepcopy(model), SAM(model.parameters(), lr=0.1), lambda m, x, y: cross_entropy(m(x), y))
    with pytest.warns(RuntimeWarning, match="none of the model's trainable parameters") as caught:
        step(x, y)
    assert [warning.filename for warning in caught] == [__file__]
    warnings.simplefilter("error")  # pytest puts the filters back
    step(x, y)
    # a part of them is somebody's choice, and a model without any has them elsewhere
    head = nn.Sequential(nn.Linear(3, 3), model)
    TrainStep(head, SAM(model.parameters(), lr=0.1), lambda m, x, y: cross_entropy(m(x), y))(x, y)
    TrainStep(nn.Tanh(), SAM(model.parameters(), lr=0.1), lambda m, x, y: cross_entropy(model(m(x)), y))(x, y)


def test_parameters_that_are_replaced_in_mid_training_are_warned_of() -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randint(2, (4,))
    step = TrainStep(model, SAM(model.parameters(), lr=0.1), lambda m, x, y: cross_entropy(m(x), y))
    step(x, y)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.warns(RuntimeWarning, match="none of the model's trainable parameters"):
        step(x, y)


class Codebook(nn.Module):
    """Its buffer moves in each forward pass, under a name that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("uses", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.uses += 1
        return x


@pytest.mark.guarantee(id="statistics-layers")
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_extra_buffers_move_in_the_first_pass_alone(micro_batches: int) -> None:
    model = nn.Sequential(network(), Codebook())
    sam = SAM(model.parameters(), **OPTIONS)
    step = TrainStep(model, sam, loss_of, micro_batches=micro_batches, extra_buffers="uses")
    for x, y in batches(2):
        step(x, y)
    assert int(model[1].uses) == 2 * micro_batches
    with pytest.raises(ValueError, match="extra_buffers"):
        TrainStep(model, sam, loss_of, extra_buffers="used")
    with pytest.raises(TypeError, match="extra_buffers"):
        TrainStep(model, sam, loss_of, extra_buffers=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [None, Schedule(every=2)])
def test_a_metric_counts_once_where_the_weights_are_not_perturbed(schedule: Schedule | None) -> None:
    """Also in a step whose first gradient is not finite."""
    model = network()
    optimizer = SAM(model.parameters(), schedule=schedule, **OPTIONS)
    seen = []

    def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = model(x)
        if not optimizer.perturbed:
            seen.append(len(x))
        return cross_entropy(out, y)

    step = TrainStep(model, optimizer, loss_fn, micro_batches=2)
    for number, (x, y) in enumerate(batches()):
        step(x * torch.nan if number == 4 else x, y)
    assert seen == [6] * 12
