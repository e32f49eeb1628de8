"""The triton backend: which tensors it takes, where it cannot be used, and what is then said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from cases import is_dense_of_a_stand_in, make_params

from sam_fast import SAM, backends
from sam_fast.backends import native
from sam_fast.backends import triton as backend

TRITON = backends.BACKENDS["triton"]


def test_importing_sam_fast_does_not_import_triton():
    script = (
        "import sys, sam_fast; sam_fast.backends.available(); sam_fast.backends.why_not(); print('triton' in "
        "sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_missing_triton_is_reported_with_what_to_do(monkeypatch):
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert "pip install sam_fast[triton]" in backends.why_not()["triton"]
    assert TRITON.build_info() == {}
    with pytest.raises(RuntimeError, match="not installed"):
        SAM(make_params([3]), lr=0.1, backend="triton")


def test_missing_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(backend, "_installed", lambda: True)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert "no GPU" in backends.why_not()["triton"]
    assert "TRITON_INTERPRET" in backends.why_not()["triton"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "triton" in backends.available()


def test_the_info_command_shows_its_state(capsys):
    from sam_fast.__main__ import main

    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert ("triton: interpreter" in shown) is backend._installed()


class Facts(SimpleNamespace):
    __torch_dispatch__ = torch.Tensor.__torch_dispatch__

    def is_neg(self) -> bool:
        return False

    is_conj = is_neg


def somewhere(device: str, **changes: object) -> Facts:
    """What the backend looks at in a tensor on a device that is not here."""
    dense = torch.zeros(3, 4)
    facts = {
        "device": torch.device(device),
        "dtype": torch.float32,
        "shape": dense.shape,
        "stride": dense.stride,
        "numel": dense.numel,
    }
    return Facts(**{**facts, **changes})


@pytest.mark.parametrize(
    ("tensor", "arithmetic", "words"),
    [
        (somewhere("cuda:0"), True, None),
        (somewhere("cuda:0", dtype=torch.complex64), True, "complex64"),
        (somewhere("cuda:0", dtype=torch.complex64), False, None),
        (somewhere("cuda:0", dtype=torch.int64), True, "int64"),
        (somewhere("cuda:0", stride=torch.zeros(4, 6)[:3, :4].stride), True, "gaps"),
        (somewhere("mps:0"), True, "mps"),
        (somewhere("cpu"), True, "TRITON_INTERPRET"),
        (somewhere("xpu:0"), True, None),
    ],
)
def test_what_it_takes_on_a_gpu(monkeypatch, tensor, arithmetic, words):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(native, "is_dense", is_dense_of_a_stand_in)
    reason = TRITON.rejects(tensor, arithmetic)
    assert reason is None if words is None else words in reason


def test_in_the_interpreter_it_takes_only_cpu_tensors(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert TRITON.rejects(torch.zeros(3)) is None
    assert "cuda" in TRITON.rejects(somewhere("cuda:0"))


@pytest.fixture
def loads(monkeypatch) -> Iterator[list[torch.device]]:
    """For which devices a kernel was compiled and loaded, where there is no other backend than triton and torch."""
    found: list[torch.device] = []
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "_installed", lambda: True)
    monkeypatch.setattr(backend, "_load_a_kernel", found.append)
    monkeypatch.setattr(native, "is_dense", is_dense_of_a_stand_in)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(type(TRITON), "unavailable", lambda self: None)
    monkeypatch.setattr(backends, "PREFERENCE", {"cuda": ("triton", "torch"), "xpu": ("triton", "torch")})
    backend._why_unusable.cache_clear()
    yield found
    backend._why_unusable.cache_clear()


@pytest.mark.parametrize("has_fp64", [True, False])
def test_an_xpu_is_taken_if_it_has_float64(monkeypatch, loads, has_fp64):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has_fp64))
    if has_fp64:
        assert backends.choose(somewhere("xpu:0")) is TRITON
    else:
        with pytest.warns(RuntimeWarning, match="no float64"):
            assert backends.choose(somewhere("xpu:0")).name == "torch"
        assert not loads


def test_a_triton_that_cannot_compile_is_one_warning_and_the_next_backend(monkeypatch, loads):
    """As without a C compiler, which Triton needs for what launches its kernels; wheels of PyTorch bring Triton along,
    but no compiler."""

    def fail(device: torch.device) -> None:
        loads.append(device)
        raise RuntimeError("Failed to find C compiler.\nMore of it")

    monkeypatch.setattr(backend, "_load_a_kernel", fail)
    with pytest.warns(RuntimeWarning) as caught:
        assert [backends.choose(somewhere(f"cuda:{index}")).name for index in (0, 1, 0)] == ["torch"] * 3
    (message,) = [str(w.message) for w in caught]
    assert "from its triton backend" in message
    assert "RuntimeError: Failed to find C compiler.). It needs a C compiler" in message
    assert loads == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(ValueError, match=r"'triton' was forced but .* cuda:0: triton cannot build a kernel .*compiler"):
        backends.choose(somewhere("cuda:0"), "triton")


def test_a_kernel_is_compiled_and_loaded_to_see_whether_it_can_be(monkeypatch):
    done = []

    class Kernel:
        @property
        def run(self) -> None:
            done.append("loaded")

    def compiled(chunks: torch.Tensor, dtype: torch.dtype) -> Kernel:
        done.append((chunks.dtype, dtype))
        return Kernel()

    monkeypatch.setattr(backend, "_kernels", lambda module: SimpleNamespace(compiled=compiled))
    backend._load_a_kernel(torch.device("cpu"))
    assert done == [(torch.int64, torch.float32), "loaded"]


def test_nothing_is_compiled_for_a_tensor_that_it_would_not_take(loads):
    assert backends.choose(somewhere("cuda:0", dtype=torch.complex64)).name == "torch"
    assert not loads
    assert backends.choose(somewhere("cuda:0")) is TRITON
    assert loads == [torch.device("cuda", 0)]
