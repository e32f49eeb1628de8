"""What only the emulation can show without a GPU: how many launches an operation takes, and what happens when one
fails.

Runs where the plugin is loaded (``make test-cuda``); the kernels' results are checked by tests/kernels on the ``cuda``
backend.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import make_params, same_bits, values

from sam_fast import SAM, backends

if "cuda_emulation.plugin" not in sys.modules:
    pytest.skip("needs the emulated CUDA module (make test-cuda)", allow_module_level=True)

from cuda_emulation.plugin import PATH

pytestmark = pytest.mark.stand_in
_library = ctypes.CDLL(PATH)
launches = ctypes.c_int64.in_dll(_library, "sam_emulation_launches")
fail_after = ctypes.c_int64.in_dll(_library, "sam_emulation_fail_after")
argument_bytes = ctypes.c_int64.in_dll(_library, "sam_emulation_argument_bytes")
probe_error = ctypes.c_int64.in_dll(_library, "sam_emulation_probe_error")
last_error = ctypes.c_int64.in_dll(_library, "sam_emulation_last_error")
current_device = ctypes.c_int64.in_dll(_library, "sam_emulation_device")
contexts = ctypes.c_int64.in_dll(_library, "sam_emulation_contexts")

# How many tensors fit into a kernel's arguments, as csrc/cuda/arguments.h computes it.
TENSORS = 802
MEDIUM_TENSORS = 256
SMALL_TENSORS = 100


@pytest.fixture(autouse=True)
def _no_fault_left() -> Iterator[None]:
    yield
    fail_after.value = -1
    probe_error.value = last_error.value = current_device.value = contexts.value = 0
    backends.cuda._cuda.use_large_arguments(True)


def count(call) -> int:
    before = launches.value
    call()
    return launches.value - before


def make(sizes, groups: int = 1, **options) -> tuple[SAM, list[torch.nn.Parameter]]:
    params = make_params(sizes)
    part = -(-len(params) // groups)
    optimizer = SAM(
        [{"params": params[i : i + part]} for i in range(0, len(params), part)], lr=0.1, backend="cuda", **options
    )
    if options.get("flatten"):
        for p in params:
            p.grad.fill_(0.01)
    return optimizer, params


@pytest.mark.parametrize("flatten", [False, True], ids=["", "flatten"])
@pytest.mark.parametrize("number", [1, SMALL_TENSORS - 1, SMALL_TENSORS, SMALL_TENSORS + 1, 161, TENSORS - 1, TENSORS])
def test_two_launches_for_the_first_step_and_one_for_the_second(number, flatten):
    optimizer, _ = make([3 + i % 70 for i in range(number)], flatten=flatten)
    assert count(optimizer.first_step) == 2
    assert count(optimizer.restore) == 1


@pytest.mark.parametrize("number", [TENSORS + 1, 2 * TENSORS, 2 * TENSORS + 1])
@pytest.mark.parametrize("large", [True, False], ids=["32KB", "4KB"])
def test_more_tensors_take_more_launches_and_give_the_same_result(number, large):
    backends.cuda._cuda.use_large_arguments(large)
    optimizer, params = make([1 + i % 70 for i in range(number)])
    cpu = make_params([1 + i % 70 for i in range(number)])
    before = values(params)
    expected = -(-number // (TENSORS if large else SMALL_TENSORS))
    assert count(optimizer.first_step) == 2 * expected
    with torch.no_grad():
        norm = torch.cat([p.grad.double() for p in cpu]).norm()
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-12)
        for p, c in zip(params, cpu, strict=True):
            assert torch.equal(p, c + c.grad * float((0.05 / (norm + 1e-12)).float()))
    assert count(optimizer.restore) == expected
    assert same_bits(values(params), before)


@pytest.mark.parametrize(
    ("groups", "large", "expected"), [(224, True, 1), (225, True, 2), (24, False, 1), (25, False, 2)]
)
def test_more_groups_than_fit_take_more_launches(groups, large, expected):
    backends.cuda._cuda.use_large_arguments(large)
    optimizer, params = make([5] * groups, groups)
    before = values(params)
    for index, group in enumerate(optimizer.param_groups):
        group["rho"] = 0.01 * index
    assert count(optimizer.first_step) == 2 * expected
    for group in optimizer.param_groups:
        (p,) = group["params"]
        (w,) = [w for w, q in zip(before, params, strict=True) if q is p]
        assert torch.equal(p, w + p.grad * (group["rho"] / (optimizer.grad_norm + 1e-12)).float())
    optimizer.restore()
    assert same_bits(values(params), before)


def test_no_gradient_at_all_takes_the_same_launches():
    optimizer, params = make([100] * 10)
    for p in params:
        p.grad = None
    assert count(optimizer.first_step) == 2
    assert float(optimizer.grad_norm) == 0.0
    assert count(optimizer.restore) == 0


def test_a_bucket_for_every_dtype_takes_its_own_launches():
    params = [p for dtype in (torch.float32, torch.bfloat16) for p in make_params([100, 5000], dtype)]
    optimizer = SAM(params, lr=0.1, backend="cuda")
    assert count(optimizer.first_step) == 4
    assert count(optimizer.restore) == 2


@pytest.mark.guarantee(id="first-step-interrupted")
@pytest.mark.parametrize("failing", range(6))
def test_a_launch_that_fails_is_an_exception_and_leaves_the_weights_as_they_were(failing):
    """2 x 3 launches: for the norm, and for the perturbation, some of whose tensors have moved when one fails."""
    optimizer, params = make([7] * 2000)
    before = values(params)
    fail_after.value = failing
    with pytest.raises(
        RuntimeError, match=r"CUDA error in (grad_norm|perturb): unspecified launch failure \(cudaErrorLaunchFailure\)"
    ):
        optimizer.first_step()
    assert same_bits(values(params), before)
    assert not optimizer.perturbed
    optimizer.first_step()
    optimizer.restore()
    assert same_bits(values(params), before)


@pytest.mark.guarantee(id="restore-interrupted")
@pytest.mark.parametrize("failing", range(3))
def test_a_restore_that_fails_can_be_repeated(failing):
    optimizer, params = make([7] * 2000)
    before = values(params)
    optimizer.first_step()
    fail_after.value = failing
    with pytest.raises(RuntimeError, match="CUDA error in restore"):
        optimizer.restore()
    assert optimizer.perturbed
    optimizer.restore()
    assert not optimizer.perturbed
    assert same_bits(values(params), before)


def test_a_backup_that_fails_is_no_backup():
    tensors = make_params([50] * 10)

    bucket = backends.BACKENDS["cuda"].bucket(tensors, [0] * 10)
    fail_after.value = 0
    with pytest.raises(RuntimeError, match="CUDA error in backup"):
        bucket.save()
    assert bucket.saved() == []


FUSED = [(torch.optim.SGD, {"momentum": 0.9}, 708, 77), (torch.optim.AdamW, {}, 450, 49)]
fused = pytest.mark.parametrize(("base", "options", "most", "small"), FUSED, ids=["sgd", "adamw"])


def second_steps(number: int, backend: str, base, **options) -> tuple[SAM, list[torch.nn.Parameter]]:
    """After a step that made the base optimizer's state, and the first half of another."""
    params = make_params([1 + i % 70 for i in range(number)])
    optimizer = SAM(params, base, lr=0.1, perturb_eps=0.0, backend=backend, **options)
    optimizer.first_step()
    optimizer.second_step()
    optimizer.first_step()
    return optimizer, params


@fused
@pytest.mark.parametrize("large", [True, False], ids=["32KB", "4KB"])
def test_one_launch_for_a_fused_second_step(base, options, most, small, large):
    backends.cuda._cuda.use_large_arguments(large)
    fit = most if large else small
    optimizer, params = second_steps(fit, "cuda", base, **options)
    assert count(optimizer.second_step) == 1
    optimizer, params = second_steps(fit + 1, "cuda", base, **options)
    assert count(optimizer.second_step) == 2
    twin_optimizer, twin = second_steps(fit + 1, "cpu", base, **options)
    twin_optimizer.second_step()
    for p, q in zip(params, twin, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)  # the norms have been summed in another order


@fused
@pytest.mark.parametrize("failing", [0, 1])
def test_a_fused_second_step_that_fails_has_stepped_whole_tensors_or_none(base, options, most, small, failing):
    backends.cuda._cuda.use_large_arguments(False)
    optimizer, params = second_steps(small + 5, "cuda", base, **options)
    optimizer.restore()
    start = values(params)
    optimizer.first_step()
    fail_after.value = failing
    with pytest.raises(RuntimeError, match=r"CUDA error in step: unspecified launch failure"):
        optimizer.second_step()
    assert optimizer.perturbed
    optimizer.restore()
    for index, (p, w) in enumerate(zip(params, start, strict=True)):
        stepped = failing == 1 and index < small
        assert torch.equal(p, w) != stepped
        if base is torch.optim.AdamW:
            assert float(optimizer.state[p]["step"]) == 1.0 + stepped


def test_a_fused_second_step_takes_no_launch_for_tensors_it_need_not_write():
    optimizer, params = make([100] * 10)
    before = values(params)
    optimizer.first_step()
    for p in params:
        p.grad = None
    assert count(optimizer.second_step) == 1  # which puts them back
    assert same_bits(values(params), before)


def test_both_orders_of_perturb_give_the_same_bits(monkeypatch):
    results = []
    for reverse in (False, True):
        monkeypatch.setattr(backends.cuda.CudaBucket, "reverse", reverse)
        optimizer, params = make([3, 70_001, 5, 20_000] * 210)
        optimizer.first_step()
        results.append(values(params))
        optimizer.restore()
    assert same_bits(*results)


# ---- Sizes of the arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "most"),
    [
        (1, 4096),
        (SMALL_TENSORS, 4096),
        (SMALL_TENSORS + 1, 11_000),
        (161, 11_000),
        (256, 11_000),
        (257, 32_764),
        (TENSORS, 32_764),
    ],
)
def test_arguments_are_no_larger_than_they_need_be(number, most):
    """Three sizes: all of them is copied at every launch."""
    optimizer, _ = make([3] * number)
    for call in (optimizer.first_step, optimizer.restore):
        call()
        assert most / 3.5 < argument_bytes.value <= most


@pytest.mark.parametrize(("groups", "most"), [(24, 4096), (25, 11_000), (48, 11_000), (49, 32_764)])
def test_groups_count_for_the_size_of_the_arguments_too(groups, most):
    optimizer, _ = make([3] * groups, groups)
    optimizer.first_step()
    assert most / 3.5 < argument_bytes.value <= most


@fused
@pytest.mark.parametrize("number", [78, 161, 256])
def test_a_medium_size_for_fused_second_steps(base, options, most, small, number):
    optimizer, _ = second_steps(number, "cuda", base, **options)
    optimizer.second_step()
    assert 4096 < argument_bytes.value < 19_000


# ---- Devices and drivers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name"),
    [(209, "cudaErrorNoKernelImageForDevice"), (35, "cudaErrorInsufficientDriver"), (999, "cudaErrorUnknown")],
)
def test_a_probe_that_fails_says_why_and_leaves_no_error_behind(code, name):
    backends.cuda._cuda.probe(0)
    probe_error.value = code
    with pytest.raises(RuntimeError, match=rf"CUDA error in probe: .*\({name}\)"):
        backends.cuda._cuda.probe(0)
    assert last_error.value == 0


@pytest.mark.parametrize("has_context", [False, True])
def test_the_device_before_is_made_current_again_only_if_it_has_a_context(has_context):
    """Making it current would give it one, with hundreds of megabytes of its memory."""
    contexts.value = int(has_context)
    backends.cuda._cuda.probe(1)
    assert contexts.value == 2 + has_context
    assert current_device.value == (0 if has_context else 1)
    backends.cuda._cuda.probe(1)
    assert contexts.value == 2 + has_context
