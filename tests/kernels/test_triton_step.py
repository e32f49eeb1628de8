"""The triton backend's fused second step: the bits of the cpu backend, what is decided on the device, interruptions."""

from __future__ import annotations

import importlib
import math
from array import array
from typing import Any

import pytest
import torch
from cases import CHUNK, INTERPRETED, buckets_of, each_dtype, make_params, same_bits, values
from conftest import UNSCALED, Step, rule_named
from step_table import CASES, STEPS
from test_step import make_state, state_of, take
from torch import Tensor

from sam_fast import SAM, backends
from sam_fast.amp import Scaling
from sam_fast.backends import triton as backend
from sam_fast.backends import upload
from sam_fast.integrations.window import at_w
from sam_fast.rounding import round_stochastically

pytestmark = [
    pytest.mark.stand_in,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: make test-triton"),
]

TRITON = backends.BACKENDS["triton"]
KEY = 0xDEADBEEF
cases = pytest.mark.parametrize(("operation", "name"), CASES, ids=[name for _, name in CASES])
one_of_each = pytest.mark.parametrize(
    ("operation", "name"),
    [("sgd", "momentum"), ("adam", "amsgrad")],
    ids=["sgd", "adam"],
)


def all_of(params: list[Any], state: dict[str, list[Tensor | None]]) -> list[Tensor]:
    return [*values(params), *(t.clone() for tensors in state.values() for t in tensors if t is not None)]


def stepped(
    name: str, operation: str, case: str, sizes: list[int], dtype: torch.dtype = torch.float32, key: int | None = None
) -> list[Tensor]:
    """Weights and state after a step in which gradients are scaled, one tensor has no gradient and one is not saved."""
    params = make_params([*sizes, 40, CHUNK + 50 if dtype == torch.float32 else 50], dtype)
    late = params[-1].grad
    params[-1].grad = None
    state = make_state(operation, case, params)
    s = Step(backends.BACKENDS[name], params)
    s.options.rounding_key = key
    s.grad_norm()
    s.partials.fill_(0.0)
    s.partials[0] = 0.25
    s.perturb()
    moved = values(params)
    params[-1].grad, params[-2].grad = late, None
    take(s, operation, case, state, Scaling(torch.tensor(3.0), None), rounding_key=key)
    return moved + all_of(params, state)


# ---- Bits ------------------------------------------------------------------------------------------------------------


@each_dtype
@cases
def test_same_bits_as_the_cpu_backend(operation, name, dtype):
    """Triton's interpreter rounds a fused multiply-add once, as the AVX2 and AVX-512 kernels do."""
    if "cpu" not in backends.available() or backends.cpu._cpu.isa() == "baseline":
        pytest.skip("needs the cpu backend on a processor with AVX2")
    sizes = [17, 3 * 512 + 5, 4100]
    assert same_bits(stepped("cpu", operation, name, sizes, dtype), stepped("triton", operation, name, sizes, dtype))
    if dtype.itemsize == 2:
        rounded = [stepped(backend, operation, name, sizes, dtype, KEY) for backend in ("cpu", "triton")]
        assert same_bits(*rounded)
        assert not same_bits(rounded[0], stepped("triton", operation, name, sizes, dtype))


@one_of_each
def test_rounding_beyond_two_to_the_31_elements(operation, name):
    """The element's index counts modulo 2^32. Only one chunk of the tensor and of the backup exists."""
    from sam_fast.kernels import adam, sgd
    from sam_fast.kernels.step import step as launch

    begin, count, slot = (1 << 31) + CHUNK, 2500, (1 << 31) + 2 * CHUNK
    chunks = torch.tensor([[0, 0, begin, count, slot]])
    # 4 GiB of addresses; no memory is used but the chunk's.
    backup = torch.empty(2 * (slot + CHUNK), dtype=torch.uint8)
    indices = torch.arange(slot, slot + count).to(torch.int32)
    (w,) = make_params([count], torch.bfloat16)
    state = make_state(operation, name, [w])
    addresses = [t.data_ptr() - 2 * begin for t in (w, w.grad)] + [1]
    backup.view(torch.bfloat16)[slot : slot + count] = w.detach()
    written = torch.tensor([9])
    if operation == "sgd":
        options = array("d", [1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        wanted = round_stochastically(w.detach().float() - w.grad.float(), w.dtype, indices, KEY)
        addresses += [0, 0, 0]
    else:
        # No gradient, m = 2^-9 and v = 0: the step is lr 2^-10, to the bit.
        options = array("d", [0.25, 0.5, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0])
        state["exp_avg"][0].fill_(0.0)
        state["exp_avg_sq"][0].fill_(0.0)
        w.grad.fill_(0.0)
        state["exp_avg"][0].fill_(2.0**-9)
        wanted = round_stochastically(w.detach().float() - 0.25 * 2.0**-10, w.dtype, indices, KEY)
        addresses += [0] + [state[key][0].data_ptr() - 2 * begin for key in ("exp_avg", "exp_avg_sq")] + [0, 0, 0]
        options = array("d", [1.0, 1.0]) + options
    numbers = torch.frombuffer(bytearray(options.tobytes()), dtype=torch.int64)
    module = sgd if operation == "sgd" else adam
    launch(module, 2, chunks, torch.tensor(addresses), 1, numbers, backup, written, 9, None, None, KEY, torch.bfloat16)
    assert same_bits([w], [wanted])


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("shifted", ["weight", "gradient", "state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@one_of_each
def test_every_alignment_takes_the_widest_access(monkeypatch, operation, name, dtype, shifted, shift):
    from interpreter import Unmasked, blocks_by_width

    size = CHUNK + 1100
    (p,) = make_params([size], dtype)

    def moved(tensor: Tensor, what: str) -> Tensor:
        by = shift if what == shifted else 0
        return torch.cat([torch.zeros(by, dtype=dtype), tensor.detach()])[by:]

    w = moved(p, "weight")
    w.grad = moved(p.grad, "gradient")
    state = make_state(operation, name, [w])
    last = "momentum_buffer" if operation == "sgd" else "max_exp_avg_sq"
    state[last][0] = moved(state[last][0], "state")
    s = Step(TRITON, [w])
    s.first_step()
    width = {1024: 16, 256: 8} if dtype == torch.float32 else {2048: 16, 1024: 8, 256: 4}
    unmasked = Unmasked(monkeypatch, width)
    take(s, operation, name, state)
    blocks = blocks_by_width([CHUNK, 1100], shift * dtype.itemsize, width)
    arrays = 5 if operation == "sgd" else 9
    assert unmasked.found == {wide: arrays * count for wide, count in blocks.items() if count}


# ---- Decided on the device -------------------------------------------------------------------------------------------


@one_of_each
def test_learning_rates_on_the_device_are_read_anew_and_cost_no_upload(operation, name):
    """Two groups, one of them with its learning rate in a tensor; in the next step another one at the same address."""
    results = []
    lr = torch.tensor(0.0, dtype=torch.float64)
    for on_device in (False, True):
        params = make_params([600, 30])
        state = make_state(operation, name, params)
        s = Step(TRITON, params, [0, 1], [{}, {}])
        _, *others = STEPS[operation].cases[name]
        s.first_step()
        for value in (0.1, 0.3):
            rate = float(lr.fill_(value))
            groups = [(0.05, *others), (math.nan if on_device else rate, *others)]
            s.take(rule_named(operation), groups, state, learning_rates=[None, lr] if on_device else [])
        results.append(all_of(params, state))
    assert same_bits(*results)
    if operation == "sgd":
        assert s.bucket.numbers.uploads == 1
    assert s.bucket.addresses.uploads == 2  # in the second step nothing is saved


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)], ids=str)
def test_bias_corrections_from_counters_on_the_device(betas):
    """In float64 and for every number of steps: what the host computes, but for 2^-51 in 1 - beta^t.

    Counters of empty tensors count too.
    """
    counts = [0.0, 1.0, 9.0, 1000.0, 1e6, 2.0**24]
    results = []
    for on_device in (False, True):
        params = make_params([*[3] * len(counts), 0], torch.float64)
        state = make_state("adam", "adamw", params)
        state["step"] = [torch.tensor(t) for t in [*counts, 5.0]]
        before = state_of(state, 0)
        s = Step(TRITON, params)
        s.first_step()
        options = (0.1, *betas, 1e-8, 0.01, 1.0, 0.0, 0.0)
        s.take(rule_named("adam"), [options], state, device_counters=on_device)
        assert [float(t) for t in state["step"]] == [*(float(torch.tensor(t) + 1) for t in counts), 6.0]
        assert float(before["step"]) == 0.0
        results.append(values(params))
    for t, host, device in zip(counts, *results, strict=False):
        smallest = min(1.0 - beta ** (t + 1) for beta in betas)
        assert torch.allclose(host, device, rtol=1e-15, atol=2.0**-51 / smallest)


# ---- Which backup ----------------------------------------------------------------------------------------------------


@one_of_each
def test_a_backup_that_was_not_written_is_not_read(operation, name):
    """A signal can come between the note that tensors are saved and the launch."""
    results = []
    for noted in (False, True):
        params = make_params([700, 30])
        state = make_state(operation, name, params)
        s = Step(TRITON, params)  # its backup is NaN
        assert s.bucket.collect(s.options)
        if noted:
            s.bucket._mark_saved(s.bucket._along)
        take(s, operation, name, state)
        results.append(all_of(params, state))
    assert same_bits(*results)
    assert not any(t.isnan().any() for t in results[0])


@one_of_each
def test_parameters_in_a_flat_buffer_are_stepped_from_its_backup(operation, name):
    """The step's tensors are the parameters; the proof that their backup was written is the flat buffer's."""
    results = []
    for flat in (False, True):
        params = make_params([64, 704])  # slots without gaps
        state = make_state(operation, name, params)
        if flat:
            buffer = torch.cat([p.detach() for p in params])
            buffer.grad = torch.cat([p.grad for p in params])
            for p, part in zip(params, (slice(64), slice(64, None)), strict=True):
                p.data = buffer[part]
            source = TRITON.bucket([buffer], [0], [params])
            s = Step(TRITON, params)
            s.bucket = source.by_parameter()
            first = Step(TRITON, [buffer])
            first.bucket = source
        else:
            s = first = Step(TRITON, params)
        first.grad_norm()
        first.partials.zero_()
        first.partials[0] = 0.25
        first.perturb()
        group = STEPS[operation].cases[name]
        options = s.read_state(rule_named(operation), [group], state)
        if flat:
            s.bucket.share_saved(source)
        s.bucket.restore_and_step(options, UNSCALED)
        results.append(all_of(params, state))
    assert same_bits(*results)


def test_a_flat_backup_that_was_not_written_is_not_read():
    params = make_params([64, 704])
    buffer = torch.cat([p.detach() for p in params])
    buffer.grad = torch.cat([p.grad for p in params])
    for p, part in zip(params, (slice(64), slice(64, None)), strict=True):
        p.data = buffer[part]
    params[0].grad = None
    source = TRITON.bucket([buffer], [0], [params])
    source.backup.fill_(math.nan)
    s = Step(TRITON, params)
    s.bucket = source.by_parameter()
    assert source.collect(s.options)
    source._mark_saved(source._along)
    options = s.read_state(rule_named("sgd"), [STEPS["sgd"].cases["plain"]], {"momentum_buffer": [None, None]})
    s.bucket.share_saved(source)
    s.bucket.restore_and_step(options, UNSCALED)  # the first parameter would be restored, the other one stepped
    assert not buffer.isnan().any()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_at_a_launch_holds_w(monkeypatch, when):
    """A signal comes before the backup is written: what is there is the step before's."""
    params = make_params([100, 1500])
    optimizer = SAM(params, backend="triton", lr=0.1)
    optimizer.first_step()
    optimizer.second_step()
    module = importlib.import_module("sam_fast.kernels.perturb")
    launch, w, saved = module.perturb, values(params), []

    def save() -> None:
        with at_w(optimizer):
            saved.extend(values(params))

    def signalled(*args: Any) -> Any:
        if when == "before":
            save()
        kernel = launch(*args)
        if when == "after":
            save()
        return kernel

    monkeypatch.setattr(module, "perturb", signalled)
    optimizer.first_step()
    assert same_bits(saved, w)
    assert not same_bits(values(params), w)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_second_step(monkeypatch, base, when):
    """The weights can still be restored; a counter has counted only what was launched and finished."""
    operation = "sgd" if base is torch.optim.SGD else "adam"
    params = make_params([100, 1500])
    optimizer = SAM(params, base, backend="triton", lr=0.1)
    for _ in range(2):
        optimizer.first_step()
        optimizer.second_step()
    before = values(params)
    optimizer.first_step()
    kernels = backend._kernels("step")
    launch = kernels.step_kernel

    class Interrupted:
        def __getitem__(self, grid):
            def run(*args, **kwargs):
                if when == "after":
                    launch[grid](*args, **kwargs)
                raise KeyboardInterrupt

            return run

    monkeypatch.setattr(kernels, "step_kernel", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        optimizer.second_step()
    monkeypatch.undo()
    assert optimizer.perturbed
    optimizer.restore()
    assert same_bits(values(params), before)
    if operation == "adam":
        assert all(float(state["step"]) == 2.0 for state in optimizer.state.values())
    optimizer.first_step()
    optimizer.second_step()
    assert not same_bits(values(params), before)


def test_a_graph_has_its_own_tables(monkeypatch):
    """Captured copies are replayed: each captured step keeps the memory of both of its tables."""
    monkeypatch.setattr(upload, "is_capturing", lambda device: True)
    params = make_params([30])
    state = make_state("sgd", "momentum", params)
    s = Step(TRITON, params)
    for steps in (1, 2):
        s.first_step()
        take(s, "sgd", "momentum", state)
        assert len(s.bucket.addresses._kept) == len(s.bucket.numbers._kept) == steps


def test_adams_counters_on_the_host_cost_no_upload_per_step():
    """The bias corrections change with every step, and go in as arguments.

    Tensors with a counter of their own are the exception.
    """
    params = make_params([30, 1500, 7, 9])
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.3}]
    optimizer = SAM(groups, torch.optim.AdamW, lr=0.01, backend="triton")
    twin_params = make_params([30, 1500, 7, 9])
    twin_groups = [{"params": twin_params[:2]}, {"params": twin_params[2:], "weight_decay": 0.3}]
    twin = SAM(twin_groups, torch.optim.AdamW, lr=0.01, backend="cpu" if "cpu" in backends.available() else "torch")

    def step() -> int:
        used = buckets_of(optimizer)
        before = sum(bucket.numbers.uploads for bucket in used)
        for each in (optimizer, twin):
            each.first_step()
            each.second_step()
        assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-8) for p, q in zip(params, twin_params, strict=True))
        return sum(bucket.numbers.uploads for bucket in used) - before

    assert [step() for _ in range(5)] == [1, 0, 0, 0, 0]
    gradient, params[3].grad, twin_params[3].grad = params[3].grad, None, None
    step()
    params[3].grad, twin_params[3].grad = gradient, gradient.clone()
    assert [step() for _ in range(2)] == [1, 1]  # it is a step behind from now on
