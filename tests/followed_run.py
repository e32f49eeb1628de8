"""An optimizer that the slow model (model_of_sam.py) follows from call to call."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import EPSILON, flattened, normal, same_bits, values
from hypothesis import assume
from model_of_sam import params_of, perturbed, stepped
from random_optimizers import laid_out, make_param
from torch import Tensor, nn

from sam_fast import SAM

EPS = 1e-12


class Raised(BaseException):
    """Like KeyboardInterrupt, not an Exception."""


class Run:
    """An optimizer, what the model knows of it, and the calls."""

    def __init__(self, optimizer: SAM, params: list[nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.params = params
        self.began: list[Tensor] | None = None  # the weights at which the step began, while perturbed
        self.now = values(params)
        self.left_flat = False  # a parameter was given other memory, and has yet to come back to the flat buffer
        # With flatten=True: ids of the parameters that were frozen when the optimizer or its copy was made. They come
        # to the flat buffer once they take part.
        self.outside: set[int] = set()
        self.check()

    # -- What holds after every call

    def follow(self, sequence: list[tuple[Any, ...]]) -> None:
        """Make the calls, and compare after each."""
        self.gradients(0, "all")
        for name, *arguments in sequence:
            getattr(self, name)(*arguments)
            self.check()
        self.restore()
        self.check()

    def check(self) -> None:
        o = self.optimizer
        assert o.state is o.base_optimizer.state
        assert o.param_groups is o.base_optimizer.param_groups
        assert o.perturbed == (self.began is not None)
        assert same_bits(self.params, self.now), "weights changed that should not have"
        assert [id(p) for p in params_of(o)] == [id(p) for p in self.params]
        for group in o.param_groups:
            assert {"rho", "adaptive", "eta", "perturb", "lr"} <= set(group)
        assert set(o.state_dict()) == {"state", "param_groups"}

    @contextmanager
    def keeps(self, *, gradients: bool = True) -> Any:
        """Addresses, and what the call must not change, stay as they are; weights that change get a
        new version.
        """
        addresses, versions, before = (
            [p.data_ptr() for p in self.params],
            [p._version for p in self.params],
            values(self.params),
        )
        grads = [None if p.grad is None else p.grad.detach().clone() for p in self.params]
        yield
        for p, address in zip(self.params, addresses, strict=True):
            assert self.left_flat or id(p) in self.outside or p.data_ptr() == address
        for p, version, w in zip(self.params, versions, before, strict=True):
            assert p._version > version or same_bits([p], [w])
        for p, grad in zip(self.params, grads, strict=True):
            if gradients and grad is not None:
                assert p.grad is not None
                assert same_bits([p.grad], [grad])

    def still_outside(self) -> set[int]:
        """The parameters that the next first step leaves outside. If it has to bring one in, it brings in all that are
        not frozen.
        """
        outside = [p for p in self.params if id(p) in self.outside]
        if not self.left_flat and all(p.grad is None for p in outside):
            return self.outside
        return {id(p) for p in outside if not p.requires_grad}

    def refused(self, call: Callable[[], Any]) -> None:
        with self.keeps(), pytest.raises(RuntimeError):
            call()

    # -- The calls

    def first_step(self) -> None:
        if self.began is not None:
            return self.refused(self.optimizer.first_step)
        before = values(self.params)
        outside = self.still_outside()
        norm, expected = perturbed(self.optimizer, EPS, outside)
        with self.keeps():
            self.optimizer.first_step()
        self.left_flat, self.outside = False, outside
        self.check_perturbed(before, norm, expected)
        self.began = before
        self.now = values(self.params)
        return None

    def check_perturbed(self, before: list[Tensor], norm: float, expected: list[tuple[Any, Tensor]]) -> None:
        found = float(self.optimizer.grad_norm)
        # Terms of the torch backend's norm are rounded to float32 where a group is adaptive.
        assert found == pytest.approx(norm, rel=2e-7, nan_ok=True)
        moved = {id(p): w for p, w in expected}
        for p, w in zip(self.params, before, strict=True):
            if id(p) not in moved or not math.isfinite(found):
                # NaN stays NaN; its payload may not survive the way through float32 (it is back after restore).
                assert same_bits([p.nan_to_num(7.0)], [w.nan_to_num(7.0)])
                continue
            compute = EPSILON[torch.float64 if p.dtype == torch.float64 else torch.float32]
            e = (moved[id(p)] - w.double()).abs()
            # Half a unit of the result in its own format, and some roundings of e in the format of the arithmetic.
            tolerance = (
                0.5 * EPSILON[p.dtype] * moved[id(p)].abs()
                + 2 * compute * (w.double().abs() + moved[id(p)].abs())
                + 8 * compute * e
            )
            if p.dtype == torch.float16:
                tolerance = tolerance + 2.0**-25  # half of the smallest number
            off = (p.detach().double() - moved[id(p)]).abs()
            assert (
                (off <= tolerance + 4e-7 * e)
                | (p.detach() == moved[id(p)].to(p.dtype))
                | (p.isnan() & moved[id(p)].isnan())
            ).all()

    def second_step(self) -> None:
        if self.began is None:
            return self.refused(self.optimizer.second_step)
        self.finish(self.optimizer.second_step)
        return None

    def step(self) -> None:
        if self.began is None:
            if all(group["lr"] == 0 for group in self.optimizer.param_groups) and all(
                p.grad is None or not p.grad.any() for p in self.params
            ):
                return None  # torch.distributed.checkpoint has the base optimizer's state made like this
            return self.refused(self.optimizer.step)
        self.finish(self.optimizer.step)
        return None

    def finish(self, call: Callable[[], Any]) -> None:
        assert self.began is not None
        expected = self.expected_update(self.began)
        with self.keeps():
            call()
        self.began = None
        self.check_update(*expected)

    def expected_update(self, began: list[Tensor]) -> tuple[list[Tensor], list[dict[str, Any]], list[Tensor]]:
        return *stepped(self.optimizer, began), stepped(self.optimizer, began, widen=True)[0]

    def check_update(self, expected: list[Tensor], states: list[dict[str, Any]], widened: list[Tensor]) -> None:
        base = type(self.optimizer.base_optimizer)
        adam = base in (torch.optim.Adam, torch.optim.AdamW)
        for p, w, state, fused in zip(self.params, expected, states, widened, strict=True):
            if p.dtype in (torch.bfloat16, torch.float16):
                # The base optimizer rounds after every operation, a fused second step only what it stores.
                close = torch.isclose(
                    p.double(), fused.double(), rtol=2 * EPSILON[p.dtype], atol=2.0**-24, equal_nan=True
                )
                assert (close | (p == w) | (p.isnan() & w.isnan())).all()
            elif adam:
                # The square root is rounded correctly here: up to a unit in the last place of the update.
                assert torch.allclose(p, w, rtol=1e-6, atol=1e-7, equal_nan=True)
            else:
                assert same_bits([p.nan_to_num(7.0)], [w.nan_to_num(7.0)])  # NaN has many bits
            own = self.optimizer.state.get(p, {})
            assert set(own) == set(state)
            for key, value in state.items():
                if isinstance(value, Tensor) and p.dtype in (torch.float32, torch.float64):
                    assert same_bits([own[key].nan_to_num(7.0)], [value.nan_to_num(7.0)]), key
        self.now = values(self.params)

    def restore(self) -> None:
        with self.keeps():
            self.optimizer.restore()
        if self.began is not None:
            self.now, self.began = self.began, None

    def raise_in_second_pass(self) -> None:
        model = nn.ParameterList(self.params)
        if self.began is None:
            return self.refused(lambda: self.optimizer.second_pass(model).__enter__())
        with self.keeps(), pytest.raises(Raised), self.optimizer.second_pass(model):
            raise Raised
        self.now, self.began = self.began, None
        return None

    def gradients(self, seed: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        for index, p in enumerate(self.params):
            if not p.requires_grad:
                continue
            if kind == "none" or (kind == "some" and (seed >> index) & 1):
                p.grad = None
                continue
            grad = normal(p.shape, generator).to(p.dtype) * (0.0 if kind == "zero" else 0.1)
            if kind in ("inf", "nan") and index == seed % len(self.params) and grad.numel() > 0:
                grad.view(-1)[seed % grad.numel()] = float(kind)
            p.grad = laid_out(grad, "gaps") if kind == "layout" else torch.empty_like(p).copy_(grad)

    def zero_grad(self, set_to_none: bool) -> None:
        with self.keeps(gradients=False):
            self.optimizer.zero_grad(set_to_none)
        assert all(p.grad is None or not p.grad.any() for p in self.params)

    def step_with(self, closure: Callable[[], Any], loss: Any, raises: Any) -> None:
        """``step(closure)`` returns the loss, or lets the closure's error through."""
        with self.keeps(gradients=False):
            if raises:
                with pytest.raises(Raised):
                    self.optimizer.step(closure)
            else:
                assert self.optimizer.step(closure) == loss

    def closure(self, seed: int, raises: int) -> None:
        """PyTorch's way: the closure is called for both passes. It raises in the call of that number."""
        count = 0
        before = values(self.params)
        outside = self.outside
        expected: Any = None

        def call() -> int:
            nonlocal count, expected, outside
            count += 1
            if count == 1:
                assert same_bits(self.params, before)
            self.gradients(seed + 1000 * count, "all")
            if count == raises:
                raise Raised
            if count == 1:
                outside = self.still_outside()
                expected = perturbed(self.optimizer, EPS, outside)
            else:
                self.check_perturbed(before, *expected)
                expected = self.expected_update(before)
            return count

        if self.began is not None:
            return self.closure_of_second_pass(seed, self.began, raises > 0)
        self.optimizer.zero_grad()
        assume(any(p.requires_grad for p in self.params))
        self.step_with(call, 1, raises)
        self.outside = outside
        if not raises:
            self.check_update(*expected)
        return None

    def closure_of_second_pass(self, seed: int, began: list[Tensor], raises: bool) -> None:
        """While the weights are perturbed the closure is the second pass."""
        expected: Any = None

        def call() -> str:
            nonlocal expected
            self.gradients(seed, "all")
            if raises:
                raise Raised
            expected = self.expected_update(began)
            return "loss"

        self.step_with(call, "loss", raises)
        self.began, self.now = None, began
        if not raises:
            self.check_update(*expected)

    def freeze(self, index: int) -> None:
        p = self.params[index % len(self.params)]
        p.requires_grad_(not p.requires_grad)
        if not p.requires_grad:
            p.grad = None

    def other_memory(self, index: int) -> None:
        """As model code does that assigns ``p.data``."""
        p = self.params[index % len(self.params)]
        p.data = p.detach().clone()
        self.left_flat = self.left_flat or (flattened(self.optimizer) and id(p) not in self.outside)

    def add_group(self, spec: Any) -> None:
        group = {"params": [make_param(*spec[:3], "contiguous")]}
        if self.began is not None:
            return self.refused(lambda: self.optimizer.add_param_group(group))
        if len(self.optimizer.param_groups) < 5:
            with self.keeps():
                self.optimizer.add_param_group(group)
            self.outside = {id(p) for p in self.params if id(p) in self.outside and not p.requires_grad}
            self.params.append(group["params"][0])
            self.now.append(values(self.params)[-1])
        return None

    def option(self, index: int, entry: tuple[str, Any]) -> None:
        self.optimizer.param_groups[index % len(self.optimizer.param_groups)][entry[0]] = entry[1]

    def save_and_load(self) -> None:
        if self.began is not None:
            return self.refused(lambda: self.optimizer.load_state_dict(self.optimizer.state_dict()))
        before = pickle.dumps(str(self.optimizer.state_dict()))
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        assert pickle.dumps(str(self.optimizer.state_dict())) == before
        return None

    def deepcopy(self) -> None:
        self.replaced(lambda both: copy.deepcopy(both))

    def pickle(self) -> None:
        self.replaced(lambda both: pickle.loads(pickle.dumps(both)))

    def replaced(self, copied: Callable[[Any], Any]) -> None:
        """Go on with a copy; the original stays as it was, whatever the copy does."""
        if self.began is not None:
            return self.refused(lambda: copied(self.optimizer))
        original, weights = self.params, self.now
        grads = [p.grad for p in original]
        self.params, self.optimizer = copied((original, self.optimizer))
        self.left_flat = False
        if flattened(self.optimizer):
            self.outside = {id(p) for p in self.params if not p.requires_grad}
        for p, grad in zip(self.params, grads, strict=True):
            if grad is not None:
                p.grad = grad.detach().clone()
        with torch.no_grad():
            for p in self.params:
                p.add_(1.0)
            assert same_bits(original, weights)
            for p, w in zip(self.params, weights, strict=True):
                p.copy_(w)
        return None
