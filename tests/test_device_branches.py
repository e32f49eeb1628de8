"""What runs only where tensors are on a GPU, or on MPS, reached on the CPU with a faked device."""

from __future__ import annotations

import re
import warnings
from array import array
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import buckets_of, is_dense_of_a_stand_in, make_params, same_bits

from sam_fast import SAM, backends, devices, fused_step, norm
from sam_fast.__main__ import main
from sam_fast.amp import Scaling, inverse_scale
from sam_fast.backends import native, tensor_lists
from sam_fast.backends import triton as triton_backend
from sam_fast.random_state import RandomState

CUDA, XPU = torch.device("cuda", 0), torch.device("xpu", 1)
PACKAGE = Path(backends.__file__).parent.parent


class FakeGpu:
    """The part of ``torch.cuda`` that sam_fast uses; records which device is made current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str = "cuda") -> None:
        self.entered: list[torch.device] = []
        self.capturing = False
        module = getattr(torch, kind)
        monkeypatch.setattr(module, "device", self.device)
        monkeypatch.setattr(module, "is_current_stream_capturing", lambda: self.capturing, raising=False)

    def device(self, device: torch.device) -> Any:
        self.entered.append(device)
        return nullcontext()


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


def test_no_private_function_of_torch_is_asked_about_devices():
    # torch.func has no public way to tell a wrapped tensor, and PyTorch's guide to subclasses names
    # DisableTorchFunctionSubclass; neither has to do with devices.
    private = re.compile(
        r"torch\.(?:_C(?!\._functorch| import DisableTorch)|cuda\._|xpu\._|mps\._|accelerator\._)\w*"
        r"|_graph_capture_health_check|_getCurrentRawStream"
    )
    found = {f"{path.name}: {hit}" for path in PACKAGE.rglob("*.py") for hit in private.findall(path.read_text())}
    assert not found


# ---- sam_fast/devices.py ---------------------------------------------------------------------------------------------


def test_the_device_is_made_current_where_there_is_a_current_one(monkeypatch):
    for device in (CUDA, XPU):
        fake = FakeGpu(monkeypatch, device.type)
        with devices.made_current(device):
            assert fake.entered == [device]
    with devices.made_current(torch.device("cpu")), devices.made_current(torch.device("mps")):
        pass


def test_capturing_is_asked_of_the_devices_own_stream(gpu):
    assert not devices.is_capturing(CUDA)
    gpu.capturing = True
    assert devices.is_capturing(CUDA)
    assert gpu.entered == [CUDA, CUDA]
    assert not devices.is_capturing(torch.device("cpu"))
    assert not devices.is_capturing(torch.device("meta"))


# ---- Captures that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW])
def test_adams_counters_on_the_host_are_no_error_on_a_gpu_unless_it_captures(gpu, base):
    """The branch that every step of Adam takes on a GPU."""
    params = make_params([10, 3])
    optimizer = SAM(params, base, lr=0.1)
    optimizer.first_step()
    optimizer.second_step()
    (bucket,) = buckets_of(optimizer)
    assert bucket.host_counters
    on_gpu = SimpleNamespace(host_counters=bucket.host_counters, device=CUDA)
    fused_step._check_host_counters(on_gpu, Scaling(None, None))
    assert gpu.entered == [CUDA]
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=r"graph on cuda:0: step counters are on the host.*capturable=True"):
        fused_step._check_host_counters(on_gpu, Scaling(None, None))


def test_replaying_random_numbers_is_refused_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    restored = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append(device))
    state = RandomState.capture([CUDA])
    state.apply()
    assert restored == [CUDA]
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=r"graph on cuda:0: replay_rng=True"):
        RandomState.capture([CUDA])


# ---- The cuda backend ------------------------------------------------------------------------------------------------


class FakeModule:
    """``sam_fast._cuda`` on a machine whose device or driver may not suit it."""

    device_type = "cuda"
    architectures = "80-real 90"
    compiler = "nvcc 13.0"

    def __init__(self, error: str | None) -> None:
        self.error = error
        self.probed: list[int] = []

    def probe(self, device: int) -> None:
        self.probed.append(device)
        if self.error is not None:
            raise RuntimeError(self.error)


class GpuTensor:
    """The part of a tensor on a GPU that the choice of a backend looks at."""

    dtype = torch.float32
    shape = torch.Size([3])
    __torch_dispatch__ = torch.Tensor.__torch_dispatch__

    def is_neg(self) -> bool:
        return False

    is_conj = is_neg

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)

    def numel(self) -> int:
        return 3

    def stride(self) -> tuple[int, ...]:
        return (1,)


@pytest.fixture
def with_module(monkeypatch):
    """``with_module(error)``: the cuda backend has a module whose probe fails with ``error``."""

    def install(error: str | None) -> FakeModule:
        module = FakeModule(error)
        monkeypatch.setattr(backends.cuda, "_cuda", module)
        monkeypatch.setattr(backends, "_warned", set())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
        monkeypatch.setattr(triton_backend, "INTERPRETED", False)
        monkeypatch.setattr(native, "is_dense", is_dense_of_a_stand_in)
        monkeypatch.setattr(triton_backend, "_why_unusable", lambda device: None)
        backends.cuda._why_unusable.cache_clear()
        return module

    yield install
    backends.cuda._why_unusable.cache_clear()


ERRORS = {
    "no kernel image": (
        "CUDA error in probe: no kernel image is available for execution on the device "
        "(cudaErrorNoKernelImageForDevice)",
        r"built for 80-real 90: build it with TORCH_CUDA_ARCH_LIST=7\.0 .*cudaErrorNoKernelImageForDevice",
    ),
    "insufficient driver": (
        "CUDA error in cudaGetDevice: CUDA driver version is insufficient for CUDA runtime version "
        "(cudaErrorInsufficientDriver)",
        r"driver is older than nvcc 13\.0 wants.*update the driver.*cudaErrorInsufficientDriver",
    ),
    "anything else": (
        "CUDA error in probe: unknown error (cudaErrorUnknown)",
        r"cannot use this device.*cudaErrorUnknown",
    ),
}


@pytest.mark.parametrize(("error", "words"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("triton", [True, False], ids=["triton", "no-triton"])
def test_a_device_that_the_module_cannot_run_on_is_one_warning_and_the_next_backend(
    with_module, monkeypatch, error, words, triton
):
    module = with_module(error)
    monkeypatch.setattr(triton_backend, "_installed", lambda: triton)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = [backends.choose(GpuTensor(index)).name for index in (0, 1, 0)]
    assert names == ["triton" if triton else "torch"] * 3
    messages = [str(w.message) for w in caught]
    assert len(messages) == (1 if triton else 2)
    assert re.search(rf"falls back from its cuda backend to a slower one: .*{words}", messages[0])
    assert module.probed == [0, 1]
    with pytest.raises(ValueError, match=words):
        backends.choose(GpuTensor(), "cuda")


def test_info_says_which_device_the_module_cannot_run_on(with_module, monkeypatch, capsys):
    with_module(ERRORS["no kernel image"][0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "build_info", dict)
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"cuda on cuda:1 +not usable: .*build it with TORCH_CUDA_ARCH_LIST=7\.0", shown)


def test_a_device_that_the_module_runs_on_is_probed_once(with_module):
    module = with_module(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [backends.choose(GpuTensor()).name for _ in range(3)] == ["cuda"] * 3
    assert module.probed == [0]


def test_launches_go_to_the_devices_current_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=4711 + device.index))
    assert backends.cuda._current_stream(torch.device("cuda", 1)) == 4712
    assert backends.cuda._current_stream(torch.device("cpu")) == 0


# ---- The triton backend ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("registers", "expected"), [(88, 5), (85, 5), (64, 8), (32, 8), (255, 2)])
def test_programs_come_from_the_compiled_kernel(monkeypatch, registers, expected):
    h100 = SimpleNamespace(
        multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    triton_backend._multiprocessors.cache_clear()
    loaded = []

    class Kernel:
        metadata = SimpleNamespace(num_warps=4)

        @property
        def run(self) -> None:
            loaded.append(True)

        @property
        def n_regs(self) -> int:
            assert loaded, "the number of registers is known once the machine code is loaded"
            return registers

    assert triton_backend._programs_at_once(Kernel(), CUDA) == expected
    bucket = SimpleNamespace(device=CUDA, _chunks=range(10_000), _programs={})
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    assert triton_backend.TritonBucket._programs_for(bucket, "perturb") == 132 * 8
    triton_backend.TritonBucket._learn(bucket, "perturb", Kernel())
    assert triton_backend.TritonBucket._programs_for(bucket, "perturb") == 132 * expected
    triton_backend._multiprocessors.cache_clear()


def test_an_xpu_has_its_own_word_for_multiprocessors(monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(gpu_subslice_count=64))
    triton_backend._multiprocessors.cache_clear()
    assert triton_backend._multiprocessors(XPU) == 64
    assert triton_backend._programs_at_once(object(), XPU) == triton_backend.PROGRAMS_PER_MULTIPROCESSOR
    triton_backend._multiprocessors.cache_clear()


class OnGpu(triton_backend.Upload):
    """Uploads for a GPU that is not here: memory is the CPU's, and nothing pinned may be allocated while a graph is
    captured.
    """

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__(torch.device("cpu"))
        self.device, self.gpu, self.allocated = CUDA, gpu, 0

    def _new_host(self, count: int) -> torch.Tensor:
        assert not self.gpu.capturing, "allocates pinned memory while a graph is captured"
        self.allocated += 1
        return torch.empty(count, dtype=torch.int64)

    def _new_device(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int64)

    def sent(self, *numbers: int) -> torch.Tensor:
        self.begin()
        return self.send(array("q", numbers).tobytes())


def test_two_uploads_per_capture_allocate_nothing(gpu):
    """Two steps in one graph, with gradients that lie elsewhere each time, and elsewhere than in the eager steps."""
    upload = OnGpu(gpu)
    eager = upload.sent(1, 2)
    for first in (3, 5, 7):
        gpu.capturing = True
        captured = [upload.sent(first, first), upload.sent(first + 1, first + 1)]
        gpu.capturing = False
        assert [t.tolist() for t in captured] == [[first, first], [first + 1, first + 1]]
        assert len({t.data_ptr() for t in (*captured, eager)}) == 3
        assert upload.sent(first, 2) is eager  # and makes new spares
        assert [t.tolist() for t in captured] == [[first, first], [first + 1, first + 1]]


def test_a_capture_of_what_was_sent_before_copies_nothing_however_often(gpu):
    """BatchNorm's statistics are saved and restored, at the same addresses as ever."""
    upload = OnGpu(gpu)
    eager = upload.sent(1, 2)
    allocated, uploads = upload.allocated, upload.uploads
    gpu.capturing = True
    assert all(upload.sent(1, 2) is eager for _ in range(10))
    gpu.capturing = False
    assert (upload.allocated, upload.uploads) == (allocated, uploads)
    assert upload.sent(1, 2) is eager
    other = upload.sent(3, 4)
    assert eager.tolist() == [1, 2], "the graph's memory is written by nobody else"
    assert other.tolist() == [3, 4]


# ---- The torch backend, where it must not read what the device computes ----------------------------------------------


DTYPES = [torch.float32, torch.bfloat16, torch.complex64]


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_lists, "is_on_host", lambda _: False)


def params_of(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in make_params([0, 5, 1009, 40_000])]
    for p, like in zip(params, make_params([0, 5, 1009, 40_000], seed=1), strict=True):
        p.grad = like.detach().to(dtype)
    return params


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tensor_lists_perturbs_as_on_the_host(dtype, adaptive, monkeypatch):
    moved = []
    for on_host in (True, False):
        monkeypatch.setattr(tensor_lists, "is_on_host", lambda _, answer=on_host: answer)
        params = params_of(dtype)
        optimizer = SAM(params, lr=0.1, rho=0.5, adaptive=adaptive, backend="torch")
        optimizer.first_step()
        moved.append([p.detach().clone() for p in params])
        assert not same_bits(moved[-1], params_of(dtype))
        optimizer.restore()
        assert same_bits(params, params_of(dtype))
    rtol = 1e-6 if dtype != torch.bfloat16 else 0.01
    assert all(torch.allclose(a, b, rtol=rtol, atol=1e-8) for a, b in zip(*moved, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("_as_on_a_gpu")
def test_the_tensor_lists_decides_on_the_device_that_nothing_moves(dtype, adaptive, value):
    params = params_of(dtype)
    for p in params[1:]:
        p.data[1:4] = torch.tensor([-0.0, 0.0, float("inf")], dtype=dtype)
    params[2].grad[7] = value
    before = [p.detach().clone() for p in params]
    SAM(params, lr=0.1, adaptive=adaptive, backend="torch").first_step()
    assert same_bits(params, before)


# ---- MPS and others --------------------------------------------------------------------------------------------------


def test_mps_has_no_float64(monkeypatch):
    made = []
    monkeypatch.setattr(
        norm, "torch", SimpleNamespace(zeros=lambda *a, **k: made.append(k["dtype"]), float32=1, float64=2)
    )
    norm.NormSum(torch.device("mps"), 1, 0)
    norm.NormSum(torch.device("cuda"), 1, 0)
    assert made == [1, 1, 2, 2]
    scale = torch.tensor(3.0)
    as_if = SimpleNamespace(device=torch.device("mps"), reciprocal=scale.reciprocal)
    assert float(inverse_scale(as_if)) == float(torch.tensor(1.0 / 3.0))
