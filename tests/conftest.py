"""Fixtures that every test file shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sam_fast import backends


@pytest.fixture(params=backends.available())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can be used on this machine, by name."""
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["", "flatten"])
def flatten(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(autouse=True)
def _same_everywhere() -> Iterator[None]:
    """Each test starts from the same random state and leaves the number of threads as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
