"""What only a GPU can show: no synchronization, few launches, streams, very large tensors.

Results are checked everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import buckets_of, make_params, norm_tolerance, on_gpu, same_bits, values
from torch import nn

from sam_fast import SAM, backends


@contextmanager
def synchronizing_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(call: Callable[[], object]) -> list[str]:
    """The names of the kernels and copies that a call runs."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.guarantee(id="no-waiting")
@pytest.mark.parametrize("flatten", [False, True], ids=["", "flatten"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_neither_step_waits_for_the_device(gpu_backend_or_torch, flatten, base):
    gpu_backend = gpu_backend_or_torch
    params = on_gpu([100, 70_000, 3])
    optimizer = SAM(params, base, lr=0.1, flatten=flatten, backend=gpu_backend, fused=True)
    for _ in range(2):  # the first step allocates
        optimizer.first_step()
        optimizer.second_step()
    with synchronizing_is_an_error():
        optimizer.first_step()
        _ = optimizer.grad_norm
        optimizer.second_step()


@pytest.mark.guarantee(id="no-waiting")
def test_a_norm_that_is_not_finite_is_decided_upon_without_waiting(gpu_backend):
    params = on_gpu([100, 70_000])
    optimizer = SAM(params, lr=0.0, backend=gpu_backend)
    optimizer.first_step()
    optimizer.restore()
    before = values(params)
    params[1].grad[69_999] = float("nan")
    with synchronizing_is_an_error():
        optimizer.first_step()
    assert same_bits(values(params), before)
    optimizer.restore()
    assert same_bits(values(params), before)


@pytest.mark.parametrize("number", [1, 161])
def test_two_launches_for_the_first_step_and_one_to_restore(gpu_backend, number):
    optimizer = SAM(on_gpu([1 + 37 * i for i in range(number)]), lr=0.1, backend=gpu_backend)
    for _ in range(2):
        optimizer.first_step()
        optimizer.restore()
    first = kernels_of(optimizer.first_step)
    assert len(first) == 2, first
    restored = kernels_of(optimizer.restore)
    assert len(restored) == 1, restored


@pytest.mark.parametrize("flatten", [False, True], ids=["", "flatten"])
@pytest.mark.parametrize(
    ("base", "options"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})], ids=["sgd", "adamw"]
)
def test_one_launch_for_a_fused_second_step(gpu_backend, base, options, flatten):
    optimizer = SAM(
        on_gpu([1 + 37 * i for i in range(161)]), base, lr=0.1, flatten=flatten, backend=gpu_backend, **options
    )
    for _ in range(2):  # the first one makes the state
        optimizer.first_step()
        optimizer.second_step()
    optimizer.first_step()
    found = kernels_of(optimizer.second_step)
    assert len(found) == 1, found
    assert optimizer.second_step_path == "fused"


@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"capturable": True})],
    ids=["sgd", "adamw"],
)
def test_a_gradient_scaler_does_not_make_the_step_wait(gpu_backend, base, options):
    """With an overflow in the third step, which is then none, and as a step without a scaler otherwise."""
    params, twin = on_gpu([100, 70_000, 3]), on_gpu([100, 70_000, 3])
    optimizer = SAM(params, base, lr=0.1, perturb_eps=0.0, backend=gpu_backend, **options)
    plain = SAM(twin, base, lr=0.1, perturb_eps=0.0, backend=gpu_backend, **options)
    for each in (optimizer, plain):  # makes the state
        each.first_step()
        each.second_step()
    assert same_bits(values(params), values(twin))
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones((), device=params[0].device))
    for p in params:
        p.grad.mul_(1024.0)
    for step in range(4):
        if step == 2:
            finite = params[1].grad.clone()
            params[1].grad[7] = float("inf")
        with synchronizing_is_an_error():
            optimizer.first_step()
            scaler.step(optimizer)
            scaler.update(1024.0)
        if step == 2:
            params[1].grad.copy_(finite)
        else:
            plain.first_step()
            plain.second_step()
        assert same_bits(values(params), values(twin))
    for p, q in zip(params, twin, strict=True):
        assert all(torch.equal(optimizer.state[p][name], plain.state[q][name]) for name in plain.state[q])


def test_adams_counters_and_learning_rate_on_the_device_give_torchs_step(gpu_backend):
    """Against AdamW on the CPU in float64: PyTorch's own capturable step has its bias corrections in float32."""
    params = on_gpu([100, 70_000, 3])
    lr = torch.tensor(0.01, device=params[0].device)
    optimizer = SAM(params, torch.optim.AdamW, lr=lr, weight_decay=0.1, rho=0.0, capturable=True, backend=gpu_backend)
    twin = [nn.Parameter(p.detach().cpu().double()) for p in params]
    oracle = torch.optim.AdamW(twin, lr=0.01, weight_decay=0.1)
    for step in range(5):
        lr.fill_(0.01 / (step + 1))
        oracle.param_groups[0]["lr"] = float(lr)
        for p, q in zip(params, twin, strict=True):
            p.grad = torch.full_like(p, 0.5**step)
            q.grad = p.grad.cpu().double()
        optimizer.first_step()
        optimizer.second_step()
        oracle.step()
    assert {float(optimizer.state[p]["step"]) for p in params} == {5.0}
    for p, q in zip(params, twin, strict=True):
        # Five steps of at most 0.01, each rounded a few times, and the rounding of the weights.
        assert torch.allclose(p.detach().cpu().double(), q, rtol=5 * 2.0**-23, atol=5e-7)


def test_steps_follow_the_current_stream(gpu_backend):
    """On a side stream, behind a long wait: the kernels must come after what was queued there before them."""
    params = on_gpu([70_000])
    optimizer = SAM(params, lr=0.0, backend=gpu_backend)
    optimizer.first_step()
    expected = values(params)
    optimizer.restore()
    true_gradient = params[0].grad.clone()
    params[0].grad.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        params[0].grad.copy_(true_gradient)
        optimizer.first_step()
    stream.synchronize()
    assert same_bits(values(params), expected)
    optimizer.restore()


def test_two_optimizers_on_two_streams(gpu_backend):
    pairs = []
    for seed in (1, 2):
        params = on_gpu([70_001, 5], seed=seed)
        pairs.append((params, SAM(params, lr=0.0, backend=gpu_backend), values(params), torch.cuda.Stream()))
    alone = []
    for params, optimizer, _, _ in pairs:
        optimizer.first_step()
        alone.append(values(params))
        optimizer.restore()
    torch.cuda.synchronize()
    for _ in range(20):
        for _, optimizer, _, stream in pairs:
            with torch.cuda.stream(stream):
                optimizer.first_step()
        torch.cuda.synchronize()
        for (params, _, _, _), moved in zip(pairs, alone, strict=True):
            assert same_bits(values(params), moved)
        for _, optimizer, _, stream in pairs:
            with torch.cuda.stream(stream):
                optimizer.restore()
        torch.cuda.synchronize()
        for params, _, start, _ in pairs:
            assert same_bits(values(params), start)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
def test_the_same_bits_as_on_the_cpu_given_the_same_norm(gpu_backend, dtype):
    """The perturbation's arithmetic is the CPU kernel's, to the bit; the norm is within its tolerance."""
    sizes = [1, 17, 4099, 100_003]
    params, on_cpu = on_gpu(sizes, dtype), make_params(sizes, dtype)
    optimizer, twin = SAM(params, lr=0.1, backend=gpu_backend), SAM(on_cpu, lr=0.1)
    optimizer.first_step()
    twin.first_step()
    assert float(optimizer.grad_norm) == pytest.approx(float(twin.grad_norm), rel=norm_tolerance(gpu_backend, dtype))
    optimizer.restore()
    twin.restore()
    for each in (optimizer, twin):
        (bucket,) = buckets_of(each)
        options = backends.GroupOptions(each.param_groups)
        assert bucket.collect(options)
        partials = torch.zeros(bucket.num_partials, dtype=torch.float64, device=bucket.device)
        partials[0] = 4.0
        bucket.perturb(options, partials, 0.0, each.grad_norm)
    assert same_bits([p.detach().cpu() for p in params], on_cpu)


def test_a_parameter_of_more_than_two_to_the_31_elements(gpu_backend):
    elements = 2**31 + 70_001
    if torch.cuda.mem_get_info()[0] < 4 * 2 * elements:
        pytest.skip("NOT CHECKED: needs 18 GB of GPU memory")
    p = nn.Parameter(torch.empty(elements, dtype=torch.bfloat16, device="cuda").fill_(1.0))
    p.grad = torch.zeros_like(p)
    far = [0, 2**31 - 1, 2**31, elements - 1]
    for index in far:
        p.grad[index] = 0.5
    optimizer = SAM([p], lr=0.1, rho=8.0, backend=gpu_backend)
    optimizer.first_step()
    assert float(optimizer.grad_norm) == 1.0
    assert [float(p[index]) for index in far] == [5.0] * 4
    assert int((p.detach() != 1.0).sum()) == 4
    optimizer.restore()
    assert not bool((p.detach() != 1.0).any())


def test_several_devices_share_one_norm(gpu_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("NOT CHECKED: needs two devices")
    params = on_gpu([1000])
    other = nn.Parameter(params[0].detach().to("cuda:1"))
    other.grad = params[0].grad.to("cuda:1")
    optimizer = SAM([params[0], other], lr=0.1, backend=gpu_backend)
    optimizer.first_step()
    norm = params[0].grad.double().norm() * 2**0.5
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=norm_tolerance(gpu_backend))
    assert torch.equal(params[0].detach().cpu(), other.detach().cpu())


def test_the_example_learns():
    import subprocess
    import sys
    from pathlib import Path

    path = Path(__file__).parent.parent.parent / "examples" / "cuda_graph.py"
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1].split()[-1].rstrip("%")) > 90.0
