"""What is written on top of the reference implementation: variants of SAM, and loops that step the base optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import give_doubles, make_params, same_bits, two_passes, values, wrap
from plain_sam import PlainSAM, furthest
from torch import Tensor

from sam_fast import SAM

CLOSE = 1e-12

BASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.RMSprop, {}),
]
every_base = pytest.mark.parametrize(("base", "options"), BASES, ids=lambda value: getattr(value, "__name__", ""))


def pair(
    base: Any = torch.optim.SGD, cls: type[SAM] = SAM, **options: Any
) -> tuple[Any, list[Any], PlainSAM, list[Any]]:
    """An optimizer and the plain one, each with parameters of its own."""
    params, twin = make_params([5, 30], torch.float64), make_params([5, 30], torch.float64)
    return cls(params, base, lr=0.1, rho=0.5, **options), params, PlainSAM(twin, base, lr=0.1, rho=0.5, **options), twin


# ---- The norm that they measure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flatten", [False, True])
def test_grad_norm_of_the_reference_is_that_of_the_gradients_as_they_are(flatten: bool) -> None:
    params = make_params([4, 7, 3], torch.float64)
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "adaptive": True},
        {"params": params[2:], "perturb": False},
    ]
    optimizer = SAM(groups, lr=0.1, rho=0.5, eta=0.2, flatten=flatten)

    def expected() -> float:
        weighted = [params[0].grad, (params[1].abs() + 0.2) * params[1].grad]
        return float(torch.cat(weighted).detach().norm())

    give_doubles(params, 1)
    assert float(optimizer._grad_norm()) == pytest.approx(expected(), rel=CLOSE)
    optimizer.first_step(zero_grad=True)
    first = float(optimizer.grad_norm)
    give_doubles(params, 2)
    measured = optimizer._grad_norm()
    assert float(measured) == pytest.approx(expected(), rel=CLOSE)
    assert not measured.requires_grad
    assert float(optimizer.grad_norm) == first
    optimizer.second_step()
    assert optimizer.second_step_path == "fused"


def test_grad_norm_without_gradients_is_zero() -> None:
    optimizer = SAM(make_params([4]), lr=0.1)
    optimizer.zero_grad()
    assert float(optimizer._grad_norm()) == 0.0


# ---- Variants of SAM -------------------------------------------------------------------------------------------------


class Decomposing(SAM):
    """Both steps of its own, as GSAM: the second gradient loses a part of what is orthogonal to it in the first."""

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norm = self._grad_norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["first"] = p.grad.clone()
                self.state[p]["e_w"] = p.grad * (group["rho"] / norm)
                p.add_(self.state[p]["e_w"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["e_w"])
                p.grad.sub_(0.3 * orthogonal(self.state[p]["first"], p.grad))
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()


def orthogonal(first: Tensor, second: Tensor) -> Tensor:
    return first - (first * second).sum() / (second * second).sum() * second


@pytest.mark.guarantee(id="others-state")
@every_base
def test_a_variant_with_both_steps_of_its_own(base: Any, options: dict[str, Any]) -> None:
    """Its entries lie in the base optimizer's state, which PyTorch's optimizers would take for their own."""
    optimizer, params, plain, twin = pair(base, Decomposing, **options)
    for step in range(4):
        two_passes(optimizer, params, step)
        give_doubles(twin, 2 * step)
        first = [p.grad.clone() for p in twin]
        plain.first_step()
        give_doubles(twin, 2 * step + 1)
        for p, g in zip(twin, first, strict=True):
            p.grad.sub_(0.3 * orthogonal(g, p.grad))
        plain.second_step()
        for p, g in zip(params, first, strict=True):
            assert torch.equal(optimizer.state[p]["first"], g)
    assert furthest(params, twin) < CLOSE
    for p, q in zip(params, twin, strict=True):
        assert optimizer.state[p].keys() - {"first", "e_w"} == plain.base.state[q].keys()


class Mixing(SAM):
    """Changes the second gradient, then leaves the step to SAM."""

    def first_step(self, zero_grad: bool = False) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["first"] = p.grad.clone()
        super().first_step(zero_grad)

    def mix(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(0.7).add_(self.state[p]["first"], alpha=0.3)

    def second_step(self, zero_grad: bool = False) -> None:
        self.mix()
        super().second_step(zero_grad)


class MixingByStep(Mixing):
    def second_step(self, zero_grad: bool = False) -> None:
        self.mix()
        self.step()


def two_calls(optimizer: SAM, backward: Callable[[], None]) -> None:
    backward()
    optimizer.first_step(zero_grad=True)
    backward()
    optimizer.second_step()


def two_calls_and_step(optimizer: SAM, backward: Callable[[], None]) -> None:
    backward()
    optimizer.first_step(zero_grad=True)
    backward()
    optimizer.step()


def with_a_scaler(optimizer: SAM, backward: Callable[[], None]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    backward()
    optimizer.first_step(zero_grad=True)
    backward()
    scaler.step(optimizer)


def closure_for_one(optimizer: SAM, backward: Callable[[], None]) -> None:
    backward()
    optimizer.step(backward, passes="second")


def closure_for_both(optimizer: SAM, backward: Callable[[], None]) -> None:
    optimizer.step(backward, passes="both")


STYLES = [two_calls, two_calls_and_step, with_a_scaler, closure_for_one, closure_for_both]


@every_base
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(("cls", "style"), [*((Mixing, style) for style in STYLES), (MixingByStep, two_calls)])
def test_the_second_step_of_a_variant_is_taken_once_in_every_style(
    base: Any, options: dict[str, Any], cls: Any, style: Callable[[SAM, Callable[[], None]], None], hooked: bool
) -> None:
    optimizer, params, plain, twin = pair(base, cls, **options)
    seen: list[int] = []
    if hooked:
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
    for step in range(3):
        seeds = iter([2 * step, 2 * step + 1])
        style(optimizer, lambda seeds=seeds: give_doubles(params, next(seeds)))
        optimizer.zero_grad()
        give_doubles(twin, 2 * step)
        first = [p.grad.clone() for p in twin]
        plain.first_step()
        give_doubles(twin, 2 * step + 1)
        for p, g in zip(twin, first, strict=True):
            p.grad.mul_(0.7).add_(g, alpha=0.3)
        plain.second_step()
    assert furthest(params, twin) < CLOSE
    assert len(seen) == (3 if hooked else 0)


@pytest.mark.parametrize("style", [closure_for_one, closure_for_both])
def test_a_closure_for_a_variant_with_both_steps_of_its_own(style: Callable[[SAM, Callable[[], None]], None]) -> None:
    one, params, _, _ = pair(torch.optim.Adam, Decomposing)
    two, others, _, _ = pair(torch.optim.Adam, Decomposing)
    for step in range(3):
        seeds = iter([2 * step, 2 * step + 1])
        style(one, lambda seeds=seeds: give_doubles(params, next(seeds)))
        one.zero_grad()
        two_passes(two, others, step)
    assert same_bits(values(params), values(others))


class Whole(SAM):
    """A step that makes both passes, as the reference's makes the second."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step(zero_grad=True)
        return loss


@every_base
@pytest.mark.parametrize("style", ["step", "two calls"])
def test_a_variant_with_a_step_of_its_own(base: Any, options: dict[str, Any], style: str) -> None:
    optimizer, params, plain, twin = pair(base, Whole, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(4):
        seeds = iter([2 * step, 2 * step + 1])
        if style == "step":
            optimizer.step(lambda seeds=seeds: give_doubles(params, next(seeds)))
        else:
            two_passes(optimizer, params, step)
        two_passes(plain, twin, step)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # scheduler.step() before optimizer.step()
            scheduler.step()
        for group in plain.base.param_groups:
            group["lr"] *= 0.5
    assert furthest(params, twin) < CLOSE


class Halving(SAM):
    """A step that does something more, as clipping or logging."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(0.5)
        return super().step(closure)


@every_base
@pytest.mark.parametrize("style", [two_calls, two_calls_and_step, with_a_scaler])
def test_a_step_that_extends_the_inherited_one_is_called_in_every_style(
    base: Any, options: dict[str, Any], style: Callable[[SAM, Callable[[], None]], None]
) -> None:
    optimizer, params, plain, twin = pair(base, Halving, **options)
    for step in range(3):
        seeds = iter([2 * step, 2 * step + 1])
        style(optimizer, lambda seeds=seeds: give_doubles(params, next(seeds)))
        optimizer.zero_grad()
        give_doubles(twin, 2 * step)
        plain.first_step()
        give_doubles(twin, 2 * step + 1)
        for p in twin:
            p.grad.mul_(0.5)
        plain.second_step()
    assert furthest(params, twin) < CLOSE


@pytest.mark.guarantee(id="wrappers")
def test_a_frameworks_wrapper_is_no_variant() -> None:
    optimizer, params, plain, twin = pair()
    wrapper, seen, step = wrap(optimizer), [], optimizer.step
    optimizer.step = lambda *args: (seen.append(args), step(*args))[1]
    two_passes(wrapper, params, 0)
    two_passes(plain, twin, 0)
    assert len(seen) == 1
    assert furthest(params, twin) < CLOSE


@pytest.mark.parametrize("scaled", [False, True])
def test_a_loop_that_puts_the_two_steps_in_the_place_of_step(scaled: bool) -> None:
    optimizer, params, plain, twin = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    scale = 4.0 if scaled else 1.0
    for step in range(3):
        for call, taken in ((0, optimizer.first_step), (1, optimizer.second_step)):
            optimizer.step = taken
            give_doubles(params, 2 * step + call)
            scaler.scale(torch.ones(()))
            for p in params:
                p.grad.mul_(scale)
            scaler.unscale_(optimizer), scaler.step(optimizer), scaler.update()
            optimizer.zero_grad()
        two_passes(plain, twin, step)
    assert furthest(params, twin) < CLOSE


class OwnFirst(SAM):
    def first_step(self, zero_grad: bool = False) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old_p"] = p.detach().clone()


class OwnNorm(SAM):
    def _grad_norm(self) -> Tensor:
        return torch.ones(())


@pytest.mark.guarantee(id="misuse")
def test_what_a_variant_cannot_rely_on_is_an_error_that_says_what_to_do() -> None:
    optimizer, params, _, _ = pair(cls=OwnFirst)
    give_doubles(params, 0)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"super\(\)\.first_step"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match=r"super\(\)\.first_step"):
        optimizer.step(lambda: give_doubles(params, 1), passes="both")
    with pytest.raises(TypeError, match=r"OwnNorm has a _grad_norm.*super\(\)\.first_step"):
        pair(cls=OwnNorm)
    with pytest.raises(AttributeError, match=r"param_groups\[0\]\['rho'\]"):
        _ = optimizer.rho
    with pytest.raises(TypeError, match=r"SAM\(optimizer, rho"):
        SAM(params, torch.optim.SGD(params, lr=0.1))


# ---- Loops that step the base optimizer ------------------------------------------------------------------------------


def by_itself(optimizer: SAM) -> None:
    optimizer.base_optimizer.step()


def by_a_scaler(optimizer: SAM) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer.base_optimizer)


@every_base
@pytest.mark.parametrize("call", [by_itself, by_a_scaler])
@pytest.mark.guarantee(id="misuse")
def test_a_step_of_the_base_optimizer_from_perturbed_weights(
    base: Any, options: dict[str, Any], call: Callable[[SAM], None]
) -> None:
    """As in loops that look for ``old_p`` in the state, and put nothing back where there is none."""
    optimizer, params, plain, twin = pair(base, **options)
    for step in range(3):
        give_doubles(params, 2 * step)
        optimizer.first_step(zero_grad=True)
        give_doubles(params, 2 * step + 1)
        perturbed = values(params)
        with pytest.raises(RuntimeError, match=r"second_step\(\).*restore\(\)"):
            call(optimizer)
        assert same_bits(values(params), perturbed)
        optimizer.second_step(zero_grad=True)
        two_passes(plain, twin, step)
    assert furthest(params, twin) < CLOSE


@every_base
def test_a_step_of_the_base_optimizer_after_restore_and_in_a_warm_up(base: Any, options: dict[str, Any]) -> None:
    optimizer, params, plain, twin = pair(base, **options)
    for step in range(6):
        if step < 2:
            give_doubles(params, step), optimizer.base_optimizer.step()
            give_doubles(twin, step), plain.base.step()
            continue
        give_doubles(params, 2 * step), optimizer.first_step(zero_grad=True)
        give_doubles(params, 2 * step + 1), optimizer.restore()
        optimizer.base_optimizer.step()
        two_passes(plain, twin, step)
    assert furthest(params, twin) < CLOSE
