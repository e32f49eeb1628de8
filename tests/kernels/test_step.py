"""step: against the formulas in float64, for every size and dtype; nothing is written outside; the same bits always."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import (
    CHUNK,
    EMULATED,
    EPSILON,
    INTERPRETED,
    SIZES,
    each_dtype,
    make_params,
    normal,
    same_bits,
    values,
)
from conftest import UNSCALED, rule_named
from step_table import CASES, COUNTER, FAR, POSITIVE, STEPS
from torch import Tensor

from sam_fast.amp import Scaling
from sam_fast.backends import Backend
from sam_fast.rounding import ROUNDED
from sam_fast.steps import RULES, NotFused

SLOW = INTERPRETED or EMULATED

cases = pytest.mark.parametrize(("operation", "name"), CASES, ids=[name for _, name in CASES])


def test_every_backend_has_every_step(kernels):
    assert kernels.bucket.steps == set(STEPS) == {rule.name for rule in RULES}


def make_state(
    operation: str, name: str, tensors: list[Tensor], seed: int = 5, device_counters: bool = False
) -> dict[str, list[Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)
    row = STEPS[operation]

    def make(kind: str, i: int, tensor: Tensor) -> Tensor:
        if kind == COUNTER:
            return torch.tensor(float(3 + i % 4), device=None if device_counters else "cpu")
        x = normal(tensor.shape, generator, torch.float64) * 0.01
        if kind == POSITIVE:
            x = x.square() + 1e-4
        return (x + 0.01 * x.sign() if kind == FAR else x).to(tensor.dtype)

    return {
        key: [make(kind, i, t) if row.uses(row.cases[name], key) else None for i, t in enumerate(tensors)]
        for key, kind in row.states.items()
    }


def expected(
    operation: str, name: str, w: Tensor, g: Tensor, state: dict[str, Tensor | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The new weight and state in float64."""
    row = STEPS[operation]
    wide = {key: tensor.double() for key, tensor in state.items() if tensor is not None}
    return row.step(row.cases[name], w.double(), g.double(), wide)


def take(
    s: Any,
    operation: str,
    name: str,
    state: dict[str, list[Tensor | None]],
    scaling: Scaling = UNSCALED,
    lr: float | None = None,
    **more: Any,
) -> None:
    """The second step of a case; the first group has ``lr`` in place of the case's own."""
    options = STEPS[operation].cases[name]
    first = options if lr is None else (lr, *options[1:])
    s.take(rule_named(operation), [first, *[options] * max(s.bucket.groups)], state, scaling, **more)


def state_of(state: dict[str, list[Tensor | None]], i: int) -> dict[str, Tensor | None]:
    return {key: None if tensors[i] is None else tensors[i].clone() for key, tensors in state.items()}


def assert_stepped(got: Tensor, want: Tensor, dtype: torch.dtype, scale: float) -> None:
    """Half a unit for storing the result, and a few roundings in the arithmetic's type of terms up to ``scale``."""
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    tiny = torch.finfo(torch.float16).tiny if dtype == torch.float16 else 0.0
    bound = 0.5 * EPSILON[dtype] * want.abs() + 16 * arithmetic * (want.abs() + scale) + tiny
    assert bool(((got.double() - want).abs() <= bound).all())


@each_dtype
@cases
def test_against_float64(step, operation, name, dtype):
    # In Triton's interpreter around one block, its masked part and one chunk: no more, it is slow.
    params = make_params([0, 1, 17, 511, 2049, CHUNK + 5] if SLOW else SIZES, dtype)
    start = values(params)
    state = make_state(operation, name, params)
    before = [state_of(state, i) for i in range(len(params))]
    s = step(params)
    s.first_step()
    for i, p in enumerate(params):
        p.grad = make_params([p.numel()], dtype, seed=100 + i)[0].grad
    take(s, operation, name, state)
    assert not s.bucket.saved()
    for i, (p, w) in enumerate(zip(params, start, strict=True)):
        want, new = expected(operation, name, w, p.grad, before[i])
        assert_stepped(p.detach(), want, dtype, 0.2)
        for key, tensor in new.items():
            if key == "step":
                assert float(state["step"][i]) == float(tensor) or p.numel() == 0
            else:
                assert_stepped(state[key][i], tensor, dtype, 0.01)


@pytest.mark.guarantee(id="bounds")
@pytest.mark.no_race
@cases
@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 15, 17, 16_385, *([] if SLOW else [300_001])])
def test_writes_nothing_outside_the_tensors(step, operation, name, size, shift):
    """Weight, gradient and state in the middle of guarded tensors, at addresses of every alignment, small and large
    enough for streaming stores.
    """

    def guarded(value: Tensor) -> tuple[Tensor, Tensor]:
        around = torch.full((shift + size + 64,), 9.0)
        around[shift : shift + size] = value
        return around, around[shift : shift + size]

    p = make_params([size])[0]
    all_around = []
    around, w = guarded(p.detach())
    grad_around, w.grad = guarded(p.grad)
    all_around += [around, grad_around]
    state = make_state(operation, name, [w])
    for tensors in state.values():
        if tensors[0] is not None and tensors[0].dim() == 1:
            state_around, tensors[0] = guarded(tensors[0])
            all_around.append(state_around)
    before = state_of(state, 0)
    s = step([w])
    s.first_step()
    take(s, operation, name, state)
    want, _ = expected(operation, name, p.detach(), p.grad, before)
    assert_stepped(w, want, torch.float32, 0.2)
    for tensor in all_around:
        assert bool((tensor[:shift] == 9.0).all())
        assert bool((tensor[shift + size :] == 9.0).all())


@cases
def test_tensors_without_a_gradient_are_restored_and_tensors_never_saved_are_stepped(step, operation, name):
    params = make_params([100, 40_000, 300])
    start = values(params)
    params[2].grad = None
    state = make_state(operation, name, params)
    before = [state_of(state, i) for i in range(3)]
    s = step(params)
    s.first_step()
    gradient = params[1].grad.clone()
    params[0].grad = None
    params[2].grad = make_params([300], seed=3)[0].grad
    take(s, operation, name, state)
    assert same_bits([params[0]], [start[0]])
    for key in state:
        if before[0][key] is not None:
            assert torch.equal(state[key][0], before[0][key])
    for i, g in ((1, gradient), (2, params[2].grad)):
        assert_stepped(params[i].detach(), expected(operation, name, start[i], g, before[i])[0], torch.float32, 0.2)
    assert not s.bucket.saved()


@pytest.mark.no_race
@cases
def test_gradients_are_scaled(step, operation, name):
    results = []
    for factor in (1.0, 1024.0):  # a power of two: exact
        params = make_params([1009, 40_000])
        state = make_state(operation, name, params)
        s = step(params)
        s.first_step()
        for p in params:
            p.grad.mul_(factor)
        take(s, operation, name, state, Scaling(torch.tensor(factor), None))
        results.append(values(params))
    assert same_bits(*results)


@pytest.fixture
def _on_device(kernels) -> None:
    """For backends whose kernels read on the device what others know on the host."""
    if not kernels.bucket.decides_on_device:
        pytest.skip(f"the {kernels.name} backend decides on the host")


def whole(params: list[Tensor], state: dict[str, list[Tensor | None]]) -> list[Tensor]:
    """Copies of weights and state."""
    return values([*params, *(t for tensors in state.values() for t in tensors if t is not None)])


@contextmanager
def nothing_read_on_the_host() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for read in ("__bool__", "__float__", "item", "tolist"):
            patch.setattr(Tensor, read, lambda self: pytest.fail("read on the host"))
        yield


@pytest.mark.no_race
@each_dtype
@cases
@pytest.mark.usefixtures("_on_device")
def test_an_overflow_is_decided_on_the_device(step, operation, name, dtype):
    """Tensors that are saved are restored, one that never was stays, and so does the state."""
    for grad_scale in (None, torch.tensor(8.0)):
        params = make_params([100, 20_000, 300, 50], dtype)
        state = make_state(operation, name, params, device_counters=True)
        before = whole(params, state)
        gradient, params[2].grad = params[2].grad, None
        s = step(params)
        s.first_step()
        params[1].grad[77] = float("inf")
        params[2].grad, params[3].grad = gradient, None
        overflow = Scaling(grad_scale, torch.tensor(1.0))
        with nothing_read_on_the_host():
            take(s, operation, name, state, overflow, device_counters=True)
        assert same_bits(whole(params, state), before)
        assert not s.bucket.saved()


@pytest.mark.no_race
@cases
@pytest.mark.usefixtures("_on_device")
def test_no_overflow_is_an_ordinary_step(step, operation, name):
    found = torch.tensor(0.0)
    results = []
    for scaling in (UNSCALED, Scaling(None, found), Scaling(torch.tensor(1.0), found)):
        params = make_params([1009, 20_000, 300, 50])
        state = make_state(operation, name, params, device_counters=True)
        gradient, params[2].grad = params[2].grad, None
        s = step(params)
        s.first_step()
        params[2].grad, params[3].grad = gradient, None
        with nothing_read_on_the_host():
            take(s, operation, name, state, scaling, device_counters=True)
        results.append(whole(params, state))
    ordinary, *others = results
    assert all(same_bits(ordinary, other) for other in others)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.usefixtures("_on_device")
def test_learning_rates_on_the_device(step, operation, name, dtype):
    """One group's is on the device, the other's among its options."""
    lr = torch.tensor(0.3, dtype=dtype)
    results = []
    for on_device in (False, True):
        params = make_params([100, 5000, 7])
        state = make_state(operation, name, params)
        s = step(params, groups=[0, 0, 1], options=[{}, {}])
        s.first_step()
        if on_device:
            take(s, operation, name, state, lr=float("nan"), learning_rates=[lr, None])
        else:
            take(s, operation, name, state, lr=float(lr))
        results.append(whole(params, state))
    assert same_bits(*results)


@each_dtype
@pytest.mark.parametrize("name", STEPS["adam"].cases)
@pytest.mark.usefixtures("_on_device")
def test_step_counters_on_the_device(step, name, dtype):
    """Neighbouring tensors have taken different numbers of steps, and one block serves many of them."""
    params = make_params([3, 100, 5000, 9000, 7, 20_000, 1, 33], dtype)
    start = values(params)
    state = make_state("adam", name, params, device_counters=True)
    before = [state_of(state, i) for i in range(len(params))]
    s = step(params)
    s.first_step()
    params[4].grad = None
    state["step"][4] = None
    take(s, "adam", name, state, device_counters=True)
    for i, (p, w) in enumerate(zip(params, start, strict=True)):
        if i == 4:
            assert same_bits([p], [w])
            continue
        want, new = expected("adam", name, w, p.grad, before[i])
        assert_stepped(p.detach(), want, dtype, 0.2)
        assert float(state["step"][i]) == float(new["step"])


@each_dtype
@cases
def test_the_bits_of_the_cpu_kernels(kernels, operation, name, dtype):
    """With a scale whose reciprocal must be rounded, an odd address, and both kinds of rounding."""
    from conftest import Step

    from sam_fast import backends

    _cpu = pytest.importorskip("sam_fast._cpu")
    if kernels.name != "cuda" or _cpu.isa() == "baseline":
        pytest.skip("only the cuda backend and processors with a fused multiply-add have the same arithmetic")

    def run(backend: Backend, key: int | None) -> list[Tensor]:
        params = make_params([1, 17, 4099, 20_001], dtype)
        params[3].data = params[3].data[1:]
        params[3].grad = params[3].grad[1:]
        state = make_state(operation, name, params)
        s = Step(backend, params)
        assert s.bucket.save()
        for p in params:
            p.data.add_(0.5)
        take(s, operation, name, state, Scaling(torch.tensor(3.0), None), rounding_key=key)
        return [t.cpu() for t in whole(params, state)]

    for key in (None, 0x9ABCDEF0) if dtype in ROUNDED else (None,):
        got = run(kernels, key)
        with torch.device("cpu"):
            assert same_bits(got, run(backends.BACKENDS["cpu"], key))


@pytest.mark.guarantee(id="same-bits")
@each_dtype
@cases
def test_same_bits_whatever_the_number_of_threads_and_the_instruction_set(operation, name, dtype):
    from conftest import VARIANTS, Step

    from sam_fast import backends

    _cpu = pytest.importorskip("sam_fast._cpu")
    chosen, results = _cpu.isa(), {}
    for variant in (v for v in VARIANTS if v.startswith("cpu-")):
        isa = variant.removeprefix("cpu-")
        for threads in (1, 3):
            _cpu.use_isa(isa)
            torch.set_num_threads(threads)
            params = make_params([3, 100_003, 17, 64_000], dtype)
            state = make_state(operation, name, params)
            s = Step(backends.BACKENDS["cpu"], params)
            s.first_step()
            take(s, operation, name, state)
            result = [*values(params), *(t for tensors in state.values() for t in tensors if t is not None)]
            # The baseline has no fused multiply-add, so its bits differ, as PyTorch's do on a processor without it.
            assert same_bits(results.setdefault(isa == "baseline", result), result)
    _cpu.use_isa(chosen)


def test_state_that_is_not_laid_out_as_its_tensor_is_refused(step):
    params = make_params([100, 7])
    s = step(params)
    s.first_step()

    def read(state: Tensor) -> None:
        s.read_state(rule_named("sgd"), [STEPS["sgd"].cases["momentum"]], {"momentum_buffer": [state, torch.zeros(7)]})

    odd_ones = [torch.zeros(100, dtype=torch.float64), torch.zeros(99), torch.zeros(100).to_sparse()]
    if s.backend.name != "torch":  # it takes any strides
        odd_ones.append(torch.zeros(200)[::2])
    for odd in odd_ones:
        with pytest.raises(NotFused, match="momentum_buffer"):
            read(odd)
    read(torch.zeros(100))
