"""The kernel tests run every operation on whole buckets, on each backend and, for the cpu backend, with each
instruction set of this machine.
"""

from __future__ import annotations

import importlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import BACKENDS, device_of
from torch import Tensor

from sam_fast import backends
from sam_fast.amp import Scaling
from sam_fast.backends import Backend, GroupOptions, StepOptions
from sam_fast.steps import RULES, Rule

UNSCALED = Scaling(None, None)


def rule_named(name: str) -> Rule:
    """The (first) rule of that name."""
    return next(rule for rule in RULES if rule.name == name)


def _variants() -> list[str]:
    names = [name for name in BACKENDS if name != "cpu"]
    if "cpu" in BACKENDS:
        _cpu = importlib.import_module("sam_fast._cpu")
        chosen = _cpu.isa()
        for isa in ("baseline", "avx2", "avx512"):
            try:
                _cpu.use_isa(isa)
            except ValueError:
                continue
            names.append(f"cpu-{isa}")
        _cpu.use_isa(chosen)
    return names


VARIANTS = _variants()

# `make sanitize` must not pass because an ordinary build was found.
if wanted := os.environ.get("SAM_FAST_EXPECT_SANITIZER"):
    assert importlib.import_module("sam_fast._cpu").sanitizer == wanted


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.gpu] if device_of(name) == "cuda" else []) for name in VARIANTS]
)
def kernels(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A backend; cpu once per instruction set. Tensors that the test makes are on the backend's device."""
    name, _, isa = request.param.partition("-")
    if not isa:
        torch.set_default_device(device_of(name))
        yield backends.BACKENDS[name]
        torch.set_default_device(None)
        return
    _cpu = importlib.import_module("sam_fast._cpu")
    chosen = _cpu.isa()
    _cpu.use_isa(isa)
    yield backends.BACKENDS[name]
    _cpu.use_isa(chosen)


class Step:
    """One bucket and what the optimizer keeps around it: the operations in the order of a step."""

    def __init__(
        self,
        backend: Backend,
        tensors: Sequence[Tensor],
        groups: Sequence[int] | None = None,
        options: list[dict[str, object]] | None = None,
    ) -> None:
        defaults: dict[str, object] = {"rho": 0.05, "adaptive": False, "eta": 0.0, "perturb": True}
        self.options = GroupOptions([{**defaults, **option} for option in options or [{}]])
        self.bucket = backend.bucket(tensors, groups or [0] * len(tensors))
        self.backend = backend
        # Poisoned: every partial sum must be written.
        self.partials = torch.full((self.bucket.num_partials,), float("nan"), dtype=torch.float64)
        self.norm = torch.full((), float("nan"), dtype=torch.float64)
        if self.bucket.dtype.is_floating_point:
            self.bucket.backup.fill_(float("nan"))

    def grad_norm(self, along: list[Tensor | None] | None = None) -> float:
        assert self.bucket.collect(self.options, along)
        self.bucket.grad_norm(self.options, self.partials)
        return float(self.partials.sum().sqrt())

    def perturb(self, eps: float = 1e-12) -> float:
        self.bucket.perturb(self.options, self.partials, eps, self.norm)
        return float(self.norm)

    def first_step(self, along: list[Tensor | None] | None = None) -> float:
        self.grad_norm(along)
        return self.perturb()

    def restore(self) -> None:
        self.bucket.restore()

    def read_state(
        self,
        rule: Rule,
        groups: Sequence[Sequence[float]],
        states: dict[str, list[Tensor | None]],
        device_counters: bool = False,
        **more: Any,
    ) -> StepOptions:
        """What the second step reads: a group's options in the kernel's order, and for each state a tensor or None per
        tensor.

        ``device_counters``: a stand-in for a device has them on the CPU, where they are taken for the host's.
        """
        bucket = self.bucket
        state = {
            source: {name: of[i] for name, of in states.items() if of[i] is not None}
            for i, source in enumerate(bucket.sources)
        }
        masks = array("Q", [0] * len(groups))
        for i, group in enumerate(bucket.groups):
            bits = (1 << k for k, name in enumerate(rule.all_names) if name in state[bucket.sources[i]])
            masks[group] |= sum(bits)
        options = StepOptions(rule, array("d", [float(x) for group in groups for x in group]), masks, **more)
        bucket.prepare_step(state, options)
        if device_counters and rule.counter is not None:
            bucket.device_counters, bucket.host_counters = True, False
            bucket._uncounted = bucket._steps
        return options

    def take(
        self,
        rule: Rule,
        groups: Sequence[Sequence[float]],
        states: dict[str, list[Tensor | None]],
        scaling: Scaling = UNSCALED,
        **more: Any,
    ) -> None:
        """The second step."""
        self.bucket.restore_and_step(self.read_state(rule, groups, states, **more), scaling)


@pytest.fixture
def step(kernels: Backend) -> Callable[..., Step]:
    """Makes a :class:`Step` on the backend under test."""
    return lambda *args, **kwargs: Step(kernels, *args, **kwargs)
