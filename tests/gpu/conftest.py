"""Tests that need a CUDA device: `make gpu-check` runs them; anywhere else they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sam_fast import backends

GPU_BACKENDS = [name for name in ("cuda", "triton") if torch.cuda.is_available() and name in backends.available()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="NOT CHECKED: needs a CUDA device"))


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """A backend with kernels for the GPU."""
    name = str(request.param)
    if name not in GPU_BACKENDS:
        pytest.skip(f"NOT CHECKED: the {name} backend cannot be used here: {backends.why_not().get(name)}")
    return name


@pytest.fixture(params=["cuda", "triton", "torch"])
def gpu_backend_or_torch(request: pytest.FixtureRequest) -> str:
    """As ``gpu_backend``, and the torch backend, which serves parameters that share memory or have gaps."""
    name = str(request.param)
    if name != "torch" and name not in GPU_BACKENDS:
        pytest.skip(f"NOT CHECKED: the {name} backend cannot be used here: {backends.why_not().get(name)}")
    return name
