"""Random sequences of calls as in test_properties.py, with schedules, first_pass and TrainStep.

The model keeps the number of steps and says by itself which of them perturb. The profile ``ci`` tries 100 sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import same_bits, values
from followed_run import EPS, Raised, Run
from hypothesis import given, settings
from hypothesis import strategies as st
from model_of_sam import perturbed
from random_optimizers import PROFILE, optimizers, profile, specs
from torch import Tensor, nn

from sam_fast import SAM, Schedule, TrainStep

SHARES = {0.0: 0, 0.25: 2, 0.5: 4, 0.75: 6}
"""Of a total of 8 steps."""

schedules = st.builds(
    lambda every, start, lasts: Schedule(every, start, None if lasts is None else SHARES.get(start, start) + lasts, 8),
    st.integers(1, 4),
    st.one_of(st.integers(0, 3), st.sampled_from(sorted(SHARES))),
    st.one_of(st.none(), st.sampled_from([1, 1, 2, 9])),
)

calls = st.one_of(
    *(st.tuples(st.just(name)) for name in 3 * ("first_step", "second_step")),
    *(
        st.tuples(st.just(name))
        for name in ("step", "restore", "save_and_load", "deepcopy", "pickle", "raise_in_second_pass", "second_pass")
    ),
    st.tuples(
        st.just("gradients"),
        st.integers(0, 99),
        st.sampled_from(["all", "all", "some", "none", "zero", "inf", "layout"]),
    ),
    st.tuples(st.just("zero_grad"), st.booleans()),
    st.tuples(st.just("closure"), st.integers(0, 99), st.sampled_from([0, 0, 1, 2])),
    st.tuples(st.just("train_step"), st.integers(0, 99), st.sampled_from([0, 0, 0, 1, 2])),
    st.tuples(st.just("train_step"), st.integers(0, 99), st.sampled_from([0, 0, 0, 1, 2])),
    st.tuples(st.just("first_pass"), st.integers(0, 99), st.booleans()),
    st.tuples(st.just("other_memory"), st.integers(0, 8)),
    st.tuples(st.just("freeze"), st.integers(0, 8)),
    st.tuples(st.just("add_group"), specs),
    st.tuples(
        st.just("option"),
        st.integers(0, 2),
        st.sampled_from([("lr", 0.02), ("rho", 0.7), ("perturb", True), ("perturb", False), ("adaptive", True)]),
    ),
)


class ScheduledRun(Run):
    """``count``: steps so far. ``midway``: first_step has begun a step that does not perturb."""

    def __init__(self, optimizer: SAM, params: list[nn.Parameter]) -> None:
        self.count, self.midway = 0, False
        self.frozen: set[int] = set()
        schedule = optimizer._schedule
        assert schedule is not None
        self.every, self.stop = schedule.every, schedule.stop
        self.start = SHARES[schedule.start] if isinstance(schedule.start, float) else schedule.start
        super().__init__(optimizer, params)

    @property
    def climbs(self) -> bool:
        last = self.count + 1 if self.stop is None else self.stop
        return self.count in range(self.start, int(last), self.every)

    def check(self) -> None:
        super().check()
        assert self.optimizer.will_perturb == self.optimizer.needs_first_pass == self.climbs
        assert [group["sam_step"] for group in self.optimizer.param_groups] == [self.count] * len(
            self.optimizer.param_groups
        )
        assert [p.requires_grad for p in self.params] == [i not in self.frozen for i in range(len(self.params))]

    def check_update(self, *expected: Any) -> None:
        super().check_update(*expected)
        self.count += 1

    # -- The calls, where the step does not perturb

    def first_step(self) -> None:
        if self.climbs or self.midway:
            return self.refused(self.optimizer.first_step) if self.midway else super().first_step()
        versions = [p._version for p in self.params]
        with self.keeps():
            self.optimizer.first_step()
        assert [p._version for p in self.params] == versions
        self.midway = True
        return None

    def second_step(self) -> None:
        if self.climbs:
            super().second_step()
        else:
            self.plainly(self.optimizer.second_step)

    def step(self) -> None:
        nothing = all(p.grad is None or not p.grad.any() for p in self.params)
        if self.climbs:
            super().step()
        elif self.midway or not nothing or any(group["lr"] != 0 for group in self.optimizer.param_groups):
            self.plainly(self.optimizer.step)  # else: how torch.distributed.checkpoint has state made

    def plainly(self, call: Callable[[], Any]) -> None:
        """The base optimizer's step, with or without first_step before it."""
        expected = self.expected_update(values(self.params))
        with self.keeps():
            call()
        self.midway = False
        self.check_update(*expected)

    def restore(self) -> None:
        super().restore()
        self.midway = False

    def second_pass(self) -> None:
        """It begins a step that does not perturb."""
        model = nn.ParameterList(self.params)
        if self.climbs and self.began is None:
            return self.refused(lambda: self.optimizer.second_pass(model).__enter__())
        with self.keeps(), self.optimizer.second_pass(model):
            pass
        self.midway = not self.climbs
        return None

    def raise_in_second_pass(self) -> None:
        if self.climbs:
            return super().raise_in_second_pass()
        with self.keeps(), pytest.raises(Raised), self.optimizer.second_pass(nn.ParameterList(self.params)):
            raise Raised
        self.midway = False
        return None

    def closure(self, seed: int, raises: int) -> None:
        if self.climbs:
            return super().closure(seed, raises)
        before, expected = values(self.params), []
        if not self.midway:
            self.optimizer.zero_grad()

        def call() -> str:
            assert not expected
            assert same_bits(self.params, before)
            self.gradients(seed, "all")
            if raises:
                raise Raised
            expected.append(self.expected_update(before))
            return "loss"

        self.step_with(call, "loss", raises)
        self.midway = False
        if not raises:
            self.check_update(*expected[0])
        return None

    def first_pass(self, seed: int, raises: bool) -> None:
        """Weights that are not perturbed get no gradient in it, where others do."""
        first_pass = self.optimizer.first_pass(nn.ParameterList(self.params))
        if self.midway or self.began is not None:
            return self.refused(first_pass.__enter__)
        self.optimizer.zero_grad()
        with self.keeps(gradients=False):
            try:
                with first_pass:
                    self.of_first_pass(seed)
                    if raises:
                        raise Raised
            except Raised:
                pass
        return None

    def of_first_pass(self, seed: int) -> None:
        climbing = [p for group in self.optimizer.param_groups if group["perturb"] for p in group["params"]]
        trained = {id(p) for i, p in enumerate(self.params) if i not in self.frozen}
        ids = trained & {id(p) for p in climbing} or trained
        assert [p.requires_grad for p in self.params] == [id(p) in ids for p in self.params]
        self.gradients(seed, "all")

    def freeze(self, index: int) -> None:
        super().freeze(index)
        self.frozen ^= {index % len(self.params)}

    def train_step(self, seed: int, raises: int) -> None:
        """TrainStep, with gradients that are made up. It raises in the pass of that number."""
        if self.midway or self.began is not None:
            self.restore()
        before, expected, passes = values(self.params), [], 0

        def backward(loss: Tensor) -> None:
            nonlocal passes
            passes += 1
            last = passes == (2 if self.climbs else 1)
            if last:
                if self.climbs:
                    self.check_perturbed(before, *expected.pop())
                self.gradients(seed + 1000, "all")
            else:
                assert same_bits(self.params, before)
                self.of_first_pass(seed)
            if passes == raises:
                raise Raised
            expected.append(self.expected_update(before) if last else perturbed(self.optimizer, EPS))

        step = TrainStep(nn.ParameterList(self.params), self.optimizer, lambda _, x: x.sum(), backward=backward)
        with self.keeps(gradients=False):
            try:
                step(torch.ones(4))
            except Raised:
                assert passes == raises
            else:
                assert passes == 1 + self.climbs
                self.check_update(*expected[0])
        assert all(p.grad is None or not p.grad.any() for p in self.params)

    # -- What is refused in mid-step

    def save_and_load(self) -> None:
        if self.midway:
            return self.refused(lambda: self.optimizer.load_state_dict(self.optimizer.state_dict()))
        return super().save_and_load()

    def add_group(self, spec: Any) -> None:
        if self.midway:
            return self.refused(lambda: self.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}))
        return super().add_group(spec)

    def replaced(self, copied: Callable[[Any], Any]) -> None:
        if self.midway:
            return self.refused(lambda: copied(self.optimizer))
        return super().replaced(copied)


@pytest.mark.guarantee(id="schedule-sequences")
@settings(profile, max_examples=100 if PROFILE == "ci" else profile.max_examples)
@given(made=optimizers(schedules), sequence=st.lists(calls, min_size=8, max_size=24))
def test_every_call_does_what_the_model_does(
    made: tuple[SAM, list[nn.Parameter]], sequence: list[tuple[Any, ...]]
) -> None:
    ScheduledRun(*made).follow(sequence)
