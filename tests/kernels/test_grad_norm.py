"""grad_norm: against float64, for every size, dtype and layout; deterministic; accurate at 100M elements."""

from __future__ import annotations

import math

import pytest
import torch
from cases import EMULATED, INTERPRETED, SIZES, each_dtype, make_params, norm_tolerance


def oracle(params, adaptive=False, eta=0.0) -> float:
    total = 0.0
    for p in params:
        if p.grad is not None:
            t = p.detach().double().abs() + eta if adaptive else 1.0
            total += float((t * p.grad.double()).square().sum())
    return math.sqrt(total)


@each_dtype
@pytest.mark.parametrize("size", SIZES)
def test_one_tensor(step, kernels, dtype, size):
    params = make_params([size], dtype)
    assert step(params).grad_norm() == pytest.approx(oracle(params), rel=norm_tolerance(kernels.name, dtype), abs=0.0)


@each_dtype
@pytest.mark.parametrize("eta", [0.0, 0.01])
def test_adaptive(step, kernels, dtype, eta):
    params = make_params(SIZES, dtype)
    options = [{"adaptive": True, "eta": eta}]
    assert step(params, options=options).grad_norm() == pytest.approx(
        oracle(params, True, eta), rel=norm_tolerance(kernels.name, dtype)
    )


def test_groups_are_looked_up_per_tensor(step, kernels):
    params = make_params(SIZES)
    groups = [i * 3 // len(params) for i in range(len(params))]
    options = [{"adaptive": True, "eta": 0.1}, {}, {"adaptive": True, "eta": 0.0}]
    parts = [
        oracle(
            [p for p, g in zip(params, groups, strict=True) if g == i],
            bool(option.get("adaptive")),
            float(option.get("eta", 0.0)),
        )
        for i, option in enumerate(options)
    ]
    assert step(params, groups, options).grad_norm() == pytest.approx(
        math.hypot(*parts), rel=norm_tolerance(kernels.name)
    )


@pytest.mark.guarantee(id="perturb-false")
def test_group_with_perturb_false_is_not_counted(step, kernels):
    params = make_params([100, 200, 300])
    norm = step(params, [0, 1, 1], [{"perturb": False}, {}]).grad_norm()
    assert norm == pytest.approx(oracle(params[1:]), rel=norm_tolerance(kernels.name))


def test_tensor_without_gradient_is_not_counted(step, kernels):
    params = make_params([100, 20_000, 300])
    params[1].grad = None
    assert step(params).grad_norm() == pytest.approx(oracle(params), rel=norm_tolerance(kernels.name))


def test_no_gradient_at_all_is_zero(step):
    assert step(make_params(SIZES, grads=False)).grad_norm() == 0.0


@pytest.mark.no_race
def test_ten_thousand_tensors(step, kernels):
    count = 500 if INTERPRETED else 10_000
    params = make_params([1 + i % 7 for i in range(count)])
    assert step(params).grad_norm() == pytest.approx(oracle(params), rel=norm_tolerance(kernels.name))


@pytest.mark.guarantee(id="non-finite-gradients")
@pytest.mark.no_race
@pytest.mark.parametrize("position", ["first", "middle", "last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 17, 40_000])
def test_non_finite_gradient_is_noticed_wherever_it_is(step, position, value, size):
    params = make_params([33, size, 33])
    params[1].grad[{"first": 0, "middle": size // 2, "last": size - 1}[position]] = value
    assert not math.isfinite(step(params).grad_norm())


@pytest.mark.guarantee(id="norm-precision")
@pytest.mark.no_race
def test_float32_squares_do_not_overflow_or_underflow(step, kernels):
    for scale in (1e30, 1e-30, 1e22, 1e-22):
        params = make_params([1000, 40_007])
        for p in params:
            p.grad.mul_(scale)
        assert step(params).grad_norm() == pytest.approx(oracle(params), rel=norm_tolerance(kernels.name))


@pytest.mark.guarantee(id="same-bits")
@pytest.mark.no_race
def test_same_bits_whatever_the_number_of_threads(step, kernels):
    if kernels.name == "torch":
        pytest.skip("torch's own reductions depend on the number of threads")
    params = make_params([3, 100_003, 250_000, 17, 64_000])
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(step(params).grad_norm())
    assert len(set(results)) == 1


@pytest.mark.guarantee(id="same-bits")
@pytest.mark.parametrize("adaptive", [False, True])
@each_dtype
def test_same_bits_on_every_instruction_set(dtype, adaptive):
    from conftest import Step

    from sam_fast import backends

    _cpu = pytest.importorskip("sam_fast._cpu")
    params = make_params(SIZES, dtype)
    chosen, results = _cpu.isa(), {}
    for isa in ("baseline", "avx2", "avx512"):
        try:
            _cpu.use_isa(isa)
        except ValueError:
            continue
        s = Step(backends.BACKENDS["cpu"], params, options=[{"adaptive": adaptive, "eta": 0.01}])
        s.first_step()
        results[isa] = (s.partials.clone(), [p.detach().clone() for p in params])
        s.restore()
    _cpu.use_isa(chosen)
    if len(results) < 2:
        pytest.skip("this processor has one instruction set only")
    (partials, moved), *others = results.values()
    for other_partials, other_moved in others:
        assert torch.equal(partials, other_partials)
        assert all(torch.equal(a, b) for a, b in zip(moved, other_moved, strict=True))


@pytest.mark.guarantee(id="norm-precision")
@pytest.mark.slow
def test_relative_error_at_100_million_elements(kernels):
    from conftest import Step

    if kernels.name == "cpu" and pytest.importorskip("sam_fast._cpu").isa() == "baseline":
        pytest.skip("the same bits as the other instruction sets")
    if INTERPRETED or EMULATED:
        pytest.skip("takes minutes in Triton's interpreter")
    p = torch.nn.Parameter(torch.empty(100_000_000))
    # All of one sign and size, so that a sum in float32 would stagnate: 1e8 * 0.01^2 in steps of 1e-4.
    p.grad = torch.rand(p.numel()).mul_(1e-3).add_(0.01)
    exact = math.sqrt(sum(float(part.double().square().sum()) for part in p.grad.split(1 << 22)))
    assert Step(kernels, [p]).grad_norm() == pytest.approx(exact, rel=1e-6)
