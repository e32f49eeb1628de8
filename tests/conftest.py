"""Fixtures that every test file shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import BACKENDS, INTERPRETED, RESTRICTED, device_of
from processes import Group, group_of
from torch.nn.modules import module as torch_module

from sam_fast import SAM, sam
from sam_fast.fused_step import fused_step

if INTERPRETED:
    import interpreter  # noqa: F401  (makes it faster)

# It makes asserts for several test files.
pytest.register_assert_rewrite("followed_run")

# On a GPU: full float32, and the same bits in every run, which the tests expect of PyTorch's own operations.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.deterministic = True
torch.backends.cudnn.benchmark = False


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark tests that have a dtype among their parameters, so that -m can leave them out."""
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec else ():
        if isinstance(value, torch.dtype) and value in (torch.float64, torch.bfloat16, torch.float16):
            item.add_marker(str(value).removeprefix("torch."))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where only some backends are tested, leave out tests that do not take each backend in turn."""
    if not RESTRICTED:
        return
    assert set(RESTRICTED.split(",")) == set(BACKENDS), (
        f"SAM_FAST_TEST_BACKENDS={RESTRICTED}, but only these can be used here: {BACKENDS}"
    )
    kept = [
        item
        for item in items
        if {"backend", "kernels"} & set(getattr(item, "fixturenames", ())) or item.get_closest_marker("stand_in")
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.gpu] if device_of(name) == "cuda" else []) for name in BACKENDS]
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that can be used on this machine, by name.

    Tensors that the test makes are on the backend's device.
    """
    with on_device_of(request.param):
        yield request.param


@contextmanager
def on_device_of(name: str) -> Iterator[None]:
    torch.set_default_device(device_of(name))
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture
def forced_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that the environment forces, which snapshots take. One thread: their tensors are small."""
    monkeypatch.setenv("SAM_FAST_BACKEND", backend)
    torch.set_num_threads(1)


@pytest.fixture
def no_hook_is_left() -> Iterator[None]:
    """Once a model is gone or enabled there is no global hook."""
    yield
    gc.collect()
    assert not torch_module._has_any_global_hook()


@pytest.fixture(params=[False, True], ids=["", "flatten"])
def flatten(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def make(backend: str, flatten: bool) -> Callable[..., SAM]:
    """Makes a SAM on the backend under test."""
    return lambda params, *args, **options: SAM(
        params, *args, **{"lr": 0.1, "backend": backend, "flatten": flatten, **options}
    )


@pytest.fixture
def was_fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each second step, whether it was fused."""
    answers: list[bool] = []

    def spy(*args: Any, **options: Any) -> str | None:
        reason = fused_step(*args, **options)
        answers.append(reason is None)
        return reason

    monkeypatch.setattr(sam, "fused_step", spy)
    return answers


@pytest.fixture(autouse=True)
def _same_everywhere() -> Iterator[None]:
    """Each test starts from the same random state and leaves the number of threads as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two() -> Iterator[Group]:
    """Two processes (tests/processes.py), for all tests of a file."""
    with group_of(2) as group:
        yield group


@pytest.fixture(scope="module")
def four() -> Iterator[Group]:
    with group_of(4) as group:
        yield group
