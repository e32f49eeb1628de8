"""Which backend is chosen, and what is said about it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from cases import buckets_of, make_params

from sam_fast import SAM, backends

cpu_only = pytest.mark.skipif("cpu" not in backends.available(), reason="the cpu backend was not built")


def chosen(params, **options) -> list[str]:
    optimizer = SAM(params, lr=0.1, **options)
    return [bucket.backend for bucket in buckets_of(optimizer)]


@cpu_only
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
def test_cpu_tensors_take_the_cpu_backend(dtype):
    assert chosen(make_params([10], dtype)) == ["cpu"]


@cpu_only
@pytest.mark.parametrize(
    "tensor", [torch.zeros(4, dtype=torch.complex64), torch.zeros(8)[::2]], ids=["complex", "strided"]
)
def test_what_the_kernels_do_not_take_goes_to_torch_without_a_warning(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen([torch.nn.Parameter(tensor)]) == ["torch"]


@pytest.mark.parametrize("name", backends.available())
def test_argument_forces_a_backend(name):
    assert chosen(make_params([10]), backend=name) == [name]


@pytest.mark.parametrize("name", backends.available())
def test_environment_variable_forces_a_backend(name, monkeypatch):
    monkeypatch.setenv("SAM_FAST_BACKEND", name)
    assert chosen(make_params([10])) == [name]


def test_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("SAM_FAST_BACKEND", "nonsense")
    assert chosen(make_params([10]), backend="torch") == ["torch"]


def test_unknown_backend_is_an_error_that_lists_the_known_ones(monkeypatch):
    with pytest.raises(ValueError, match=r"backend='nonsense'.*torch"):
        SAM(make_params([10]), lr=0.1, backend="nonsense")
    monkeypatch.setenv("SAM_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"SAM_FAST_BACKEND='nonsense'"):
        SAM(make_params([10]), lr=0.1)


@cpu_only
@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, dtype=torch.complex64), torch.zeros(8)[::2], torch.zeros(3, device="meta")],
    ids=["complex", "strided", "device"],
)
def test_forced_backend_that_does_not_take_a_parameter_is_an_error(tensor):
    p = torch.nn.Parameter(tensor)
    p.grad = torch.zeros_like(p)  # without one, a parameter on the meta device is left alone
    with pytest.raises(ValueError, match="forced"):
        SAM([p], lr=0.1, backend="cpu")


@pytest.mark.guarantee(id="pure-python")
def test_missing_backend_is_reported_once_with_the_reason(monkeypatch):
    monkeypatch.setattr(backends.cpu, "_cpu", None)
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"cpu backend.*SAM_FAST_NATIVE") as caught:
        found = [chosen(make_params([10])) for _ in range(2)]
    assert found == [["torch"], ["torch"]]
    assert len(caught) == 1
    assert "SAM_FAST_NATIVE" in backends.why_not()["cpu"]
    assert "cpu" not in backends.available()
    with pytest.raises(RuntimeError, match="SAM_FAST_NATIVE"):
        SAM(make_params([10]), lr=0.1, backend="cpu")


class GpuTensor:
    """As much of a tensor on a GPU as the choice of a backend looks at."""

    device = torch.device("cuda", 0)
    dtype = torch.float32


def reported_for_a_gpu(monkeypatch) -> list[str]:
    monkeypatch.setattr(backends, "_warned", set())
    for name in ("cuda", "triton"):
        monkeypatch.setattr(type(backends.BACKENDS[name]), "unavailable", lambda self: f"no {self.name} here")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert backends.choose(GpuTensor()).name == "torch"
    return [str(w.message) for w in caught]


def test_gpu_without_kernels_is_reported_once_for_each_backend(monkeypatch):
    messages = reported_for_a_gpu(monkeypatch)
    assert len(messages) == 2
    assert "cuda backend" in messages[0]
    assert "no cuda here" in messages[0]
    assert "no triton here" in messages[1]


def test_on_rocm_the_cuda_backend_is_not_missed(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in backends.why_not()["cuda"]
    (message,) = reported_for_a_gpu(monkeypatch)
    assert "no triton here" in message


def test_the_best_backend_for_a_gpu_is_cuda_then_triton(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    for name in ("cuda", "triton"):
        monkeypatch.setattr(type(backends.BACKENDS[name]), "unavailable", lambda self: None)
        monkeypatch.setattr(type(backends.BACKENDS[name]), "unusable_on", lambda self, device: None)
        monkeypatch.setattr(type(backends.BACKENDS[name]), "rejects", lambda self, tensor, arithmetic=True: None)
    assert backends.choose(GpuTensor()).name == "cuda"
    monkeypatch.setattr(
        type(backends.BACKENDS["cuda"]), "rejects", lambda self, tensor, arithmetic=True: "not this one"
    )
    assert backends.choose(GpuTensor()).name == "triton"


def test_old_pytorch_is_reported(monkeypatch):
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert "2.10" in backends.why_not()["cpu"]


@cpu_only
@pytest.mark.parametrize(("isa", "fails"), [("baseline", False), ("sse9", True)])
def test_instruction_set_can_be_named(isa, fails):
    script = "import torch, sam_fast; print(sam_fast.backends.build_info()['cpu: instruction set in use'])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"SAM_FAST_CPU_ISA": isa, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) is fails
    error = f"ValueError: SAM_FAST_CPU_ISA='{isa}' is unknown, or this processor cannot run it: use baseline, avx2"
    assert (error in done.stderr) if fails else (done.stdout.strip() == isa)


@cpu_only
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_kernels_get_as_many_threads_as_pytorch_has(threads, monkeypatch):
    asked = []
    for name in ("grad_norm", "perturb", "restore"):
        kernel = getattr(backends.cpu._cpu, name)
        monkeypatch.setattr(
            backends.cpu._cpu, name, lambda *args, kernel=kernel: (asked.append(args[-1]), kernel(*args))[1]
        )
    optimizer = SAM(make_params([100]), lr=0.1)
    torch.set_num_threads(threads)
    optimizer.first_step()
    optimizer.restore()
    assert asked == [threads] * 3


@cpu_only
def test_kernels_release_the_interpreter_lock():
    """A Python thread makes progress while a kernel runs: it counts during one norm of 64M elements."""
    p = torch.nn.Parameter(torch.zeros(64_000_000))
    p.grad = torch.ones_like(p)
    optimizer = SAM([p], lr=0.1)
    (bucket,) = buckets_of(optimizer)
    options = backends.GroupOptions(optimizer.param_groups)
    partials = torch.zeros(bucket.num_partials, dtype=torch.float64)
    bucket.collect(options)
    torch.set_num_threads(1)
    done, counted = threading.Event(), [0]

    def count() -> None:
        while not done.is_set():
            counted[0] += 1
            # gives the lock away: the interpreter itself does not take it from a thread within the interval set below
            time.sleep(0)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    thread.start()
    try:
        # With a switch interval this long the thread only runs while the lock is released on purpose.
        sys.setswitchinterval(100.0)
        before = counted[0]
        bucket.grad_norm(options, partials)
        during = counted[0] - before
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert during > 0
