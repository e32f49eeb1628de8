"""The kernel tests run every operation on whole buckets, on each backend and, for the cpu backend, with each instruction set of this machine."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from cases import BACKENDS, device_of
from torch import Tensor

from sam_fast import backends
from sam_fast.backends import GroupOptions
from sam_fast.backends.base import Backend
from sam_fast.bucket import Bucket


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


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.gpu] if device_of(name) == "cuda" else []) for name in VARIANTS])
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
        self, backend: Backend, rows: Sequence[Tensor], groups: Sequence[int] | None = None, options: list[dict[str, object]] | None = None
    ) -> None:
        defaults: dict[str, object] = {"rho": 0.05, "adaptive": False, "eta": 0.0, "perturb": True}
        self.options = GroupOptions([{**defaults, **option} for option in options or [{}]])
        self.bucket = Bucket(rows, groups or [0] * len(rows), backend)
        self.backend = backend
        # Poisoned: every partial sum must be written.
        self.partials = torch.full((backend.num_partials(self.bucket),), float("nan"), dtype=torch.float64)
        self.norm = torch.full((), float("nan"), dtype=torch.float64)
        if self.bucket.dtype.is_floating_point:
            self.bucket.flat.fill_(float("nan"))

    def grad_norm(self) -> float:
        assert self.backend.collect(self.bucket, self.options)
        self.backend.grad_norm(self.bucket, self.options, self.partials)
        return float(self.partials.sum().sqrt())

    def perturb(self, eps: float = 1e-12) -> float:
        self.backend.perturb(self.bucket, self.options, self.partials, eps, self.norm)
        return float(self.norm)

    def climb(self) -> float:
        self.grad_norm()
        return self.perturb()

    def restore(self) -> None:
        self.backend.restore(self.bucket)


@pytest.fixture
def step(kernels: Backend) -> Callable[..., Step]:
    """Makes a :class:`Step` on the backend under test."""
    return lambda *args, **kwargs: Step(kernels, *args, **kwargs)
