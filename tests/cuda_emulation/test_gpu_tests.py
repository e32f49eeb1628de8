"""tests/gpu, rehearsed: what can run without a GPU does, on the emulated kernels and with a ``torch.cuda`` that does
nothing. GPU time is scarce, and must not go to tests that fail by themselves.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.amp import GradScaler

if "cuda_emulation.plugin" not in sys.modules:
    pytest.skip("needs the emulated CUDA module (make test-cuda)", allow_module_level=True)

from cuda_emulation.plugin import PATH

pytestmark = [pytest.mark.stand_in, pytest.mark.no_race]
_launches = ctypes.c_int64.in_dll(ctypes.CDLL(PATH), "sam_emulation_launches")


class Stream:
    """Where everything is done when the call returns."""

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextmanager
def waiting_is_no_error() -> Iterator[None]:
    yield


def launches_of(call: Callable[[], object]) -> list[str]:
    before = _launches.value
    call()
    return ["a kernel"] * (_launches.value - before)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tests/gpu/test_on_a_gpu.py, whose tensors stay on the CPU."""
    path = Path(__file__).parents[1] / "gpu" / "test_on_a_gpu.py"
    spec = importlib.util.spec_from_file_location("rehearsed_gpu_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "synchronizing_is_an_error", waiting_is_no_error)
    monkeypatch.setattr(module, "kernels_of", launches_of)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda _, **options: GradScaler("cpu", **options))
    stand_ins: dict[str, Any] = {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
        "synchronize": lambda: None,
        "_sleep": lambda _: None,
        "mem_get_info": lambda: (0, 0),
        "device_count": lambda: 1,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return module


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
RUNS: dict[str, list[dict[str, Any]]] = {
    "test_neither_step_waits_for_the_device": [
        {"gpu_backend_or_torch": name, "flatten": flatten, "base": base}
        for name, flatten, base in (("cuda", False, SGD), ("cuda", True, ADAMW), ("torch", False, ADAMW))
    ],
    "test_a_norm_that_is_not_finite_is_decided_upon_without_waiting": [{}],
    "test_two_launches_for_the_first_step_and_one_to_restore": [{"number": 1}, {"number": 161}],
    "test_one_launch_for_a_fused_second_step": [
        {"base": SGD, "options": {"momentum": 0.9}, "flatten": False},
        {"base": ADAMW, "options": {}, "flatten": True},
    ],
    "test_a_gradient_scaler_does_not_make_the_step_wait": [{"base": SGD, "options": {"momentum": 0.9}}],
    "test_steps_follow_the_current_stream": [{}],
    "test_two_optimizers_on_two_streams": [{}],
    "test_the_same_bits_as_on_the_cpu_given_the_same_norm": [{"dtype": torch.float32}],
}
"""Test -> the arguments of its runs. Where none of them says so the backend is ``cuda``."""

NOT_HERE = {
    "test_adams_counters_and_learning_rate_on_the_device_give_torchs_step": "capturable=True is for a GPU",
    "test_a_parameter_of_more_than_two_to_the_31_elements": "too large",
    "test_several_devices_share_one_norm": "there is one device",
    "test_the_example_learns": "the example is a process of its own",
}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, run) for name, runs in RUNS.items() for run in runs],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_on_a_gpu(gpu: ModuleType, name: str, arguments: dict[str, Any]) -> None:
    backend = {} if "gpu_backend_or_torch" in arguments else {"gpu_backend": "cuda"}
    getattr(gpu, name)(**backend, **arguments)


def test_none_is_forgotten(gpu: ModuleType) -> None:
    assert {name for name in vars(gpu) if name.startswith("test_")} == {*RUNS, *NOT_HERE}
