"""perturb: w + e against float64, the backup bit for bit, and nothing is written outside the tensors."""

from __future__ import annotations

import math

import pytest
import torch
from cases import EPSILON, SIZES, each_dtype, make_params, same_bits, values


def expected(w, g, norm, rho=0.05, adaptive=False, eta=0.0, eps=1e-12):
    """w + e in float64."""
    w, g = w.double(), g.double()
    t = w.abs() + eta if adaptive else torch.ones_like(w)
    return w + t * t * g * (rho / (norm + eps))


def assert_perturbed(moved, w, g, norm, **options) -> None:
    want = expected(w, g, norm, **options)
    e = (want - w.double()).abs()
    # Half a unit in the last place for storing w + e, and a few roundings in the arithmetic's own dtype (float32, or
    # float64) of e.
    arithmetic = torch.finfo(torch.float64 if w.dtype == torch.float64 else torch.float32).eps
    stored = torch.finfo(w.dtype).tiny if w.dtype == torch.float16 else 0.0  # subnormal halves are spaced absolutely
    bound = 0.5 * EPSILON[w.dtype] * want.abs() + 4 * arithmetic * (e + want.abs()) + stored
    assert bool(((moved.double() - want).abs() <= bound).all())


@each_dtype
@pytest.mark.parametrize("size", SIZES)
def test_one_tensor(step, dtype, size):
    params = make_params([size], dtype)
    before = values(params)
    s = step(params)
    norm = s.first_step()
    assert_perturbed(params[0].detach(), before[0], params[0].grad, norm)
    s.restore()
    assert same_bits(values(params), before)


@each_dtype
@pytest.mark.parametrize("eta", [0.0, 0.01])
def test_adaptive(step, dtype, eta):
    params = make_params(SIZES, dtype)
    before = values(params)
    s = step(params, options=[{"rho": 0.5, "adaptive": True, "eta": eta}])
    norm = s.first_step()
    for p, w in zip(params, before, strict=True):
        assert_perturbed(p.detach(), w, p.grad, norm, rho=0.5, adaptive=True, eta=eta)


def test_groups_are_looked_up_per_tensor(step):
    params = make_params(SIZES)
    before = values(params)
    groups = [i * 3 // len(params) for i in range(len(params))]
    options = [{"rho": 0.1}, {"rho": 0.7, "adaptive": True, "eta": 0.1}, {"rho": 0.0}]
    norm = (s := step(params, groups, options)).first_step()
    for p, w, group in zip(params, before, groups, strict=True):
        assert_perturbed(p.detach(), w, p.grad, norm, **options[group])
    s.restore()
    assert same_bits(values(params), before)


def test_norm_is_written_out(step):
    params = make_params([100, 40_000])
    s = step(params)
    assert s.first_step() == pytest.approx(float(s.partials.sum().sqrt()), rel=1e-14)


def test_maximize_goes_the_other_way(step):
    up, down = make_params([1000]), make_params([1000])
    step(up).first_step()
    step(down, options=[{"maximize": True}]).first_step()
    start = make_params([1000])[0]
    assert torch.allclose(up[0] - start, start - down[0], atol=1e-7)
    assert not torch.equal(up[0], down[0])


def test_eps_is_added_to_the_norm(step):
    params = make_params([1000])
    before = values(params)
    s = step(params)
    s.grad_norm()
    norm = s.perturb(eps=1.0)
    assert_perturbed(params[0].detach(), before[0], params[0].grad, norm, eps=1.0)


@each_dtype
def test_zero_gradient_moves_nothing(step, dtype):
    params = make_params(SIZES, dtype)
    for p in params:
        p.grad.zero_()
    before = values(params)
    assert step(params).first_step() == 0.0
    assert same_bits(values(params), before)


@each_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_norm_moves_nothing_and_restores(step, dtype, value):
    params = make_params([5, 40_000, 17], dtype)
    params[1].grad[39_999] = value
    before = values(params)
    s = step(params)
    assert not math.isfinite(s.first_step())
    assert same_bits(values(params), before)
    for p in params:
        p.data.fill_(7.0)
    s.restore()
    assert same_bits(values(params), before)


def test_tensors_without_gradient_are_neither_moved_nor_saved(step, kernels):
    params = make_params([100, 20_000, 300])
    params[1].grad = None
    s = step(params)
    s.first_step()
    assert s.bucket.saved() == [0, 2]
    params[1].data.fill_(3.0)
    s.restore()
    assert bool((params[1] == 3.0).all())
    assert not s.bucket.saved()


@pytest.mark.guarantee(id="bounds")
@pytest.mark.no_race
@each_dtype
@pytest.mark.parametrize("size", [1, 15, 16, 17, 16_384, 16_385, 33_001])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_writes_nothing_outside_the_tensor(step, dtype, size, shift):
    """At addresses of every alignment inside a guarded tensor: the elements before and behind keep their values."""
    around = torch.full((shift + size + 64,), 9.0, dtype=dtype)
    w = around[shift : shift + size]
    w.copy_(make_params([size], dtype)[0].detach())
    w.grad = make_params([size], dtype)[0].grad
    before = w.clone()
    s = step([w])
    norm = s.first_step()
    assert_perturbed(w, before, w.grad, norm)
    s.restore()
    assert same_bits([w], [before])
    assert bool((around[:shift] == 9.0).all())
    assert bool((around[shift + size :] == 9.0).all())


@each_dtype
def test_backup_holds_the_weights_in_their_slots(step, dtype):
    params = make_params([5, 40_000, 0, 17], dtype)
    before = values(params)
    s = step(params)
    s.first_step()
    assert same_bits(s.bucket.backups, before)


def test_streaming_and_ordinary_stores_agree(step):
    """A large bucket is backed up past the caches, a small one through them."""
    small, large = make_params([1003]), make_params([1003, 2_000_000])
    large[1].grad.zero_()
    large[1].data.zero_()
    step(small).first_step()
    step(large).first_step()
    assert torch.equal(small[0], large[0])


@pytest.mark.no_race
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_bits(step, threads):
    params, once = make_params([3, 100_003, 250_000, 17]), make_params([3, 100_003, 250_000, 17])
    torch.set_num_threads(1)
    s = step(once)
    s.grad_norm()
    partials = s.partials.clone()
    s.perturb()
    torch.set_num_threads(threads)
    s = step(params)
    s.grad_norm()
    s.partials.copy_(partials)
    s.perturb()
    assert same_bits(values(params), values(once))


def perturbed(step, w: float, g: float, size: int, dtype=torch.float32, eps: float = 0.0, **options):
    """``size`` weights and gradients around two numbers after perturb, what they were, and the norm."""
    factors = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    p = torch.nn.Parameter((factors * w).to(dtype))
    p.grad = (factors.flip(0) * g).to(dtype)
    before = values([p])[0]
    s = step([p], options=[options])
    s.grad_norm()
    return p, before, s.perturb(eps)


@pytest.mark.guarantee(id="asam-range")
@pytest.mark.no_race
@pytest.mark.parametrize(("w", "g"), [(1e3, 1e33), (1e-15, 1e-15), (-1e3, 1e33), (1e15, 1e-15), (1e-30, 1e5)], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-12])
@pytest.mark.parametrize("size", [7, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_asams_products_neither_overflow_nor_underflow(step, w, g, eps, size, dtype):
    """T T g overflows or underflows float32, e does not."""
    p, before, norm = perturbed(step, w, g, size, dtype, eps, rho=0.5, adaptive=True)
    want = expected(before, p.grad, norm, rho=0.5, adaptive=True, eps=eps)
    # A scale below 1e-38 is subnormal, and has fewer bits.
    bound = (
        0.5 * EPSILON[dtype] * want.abs() + 1e-5 * (want - before.double()).abs() + EPSILON[torch.float32] * want.abs()
    )
    assert bool(((p.detach().double() - want).abs() <= bound).all())
    assert eps > 0.0 or not torch.equal(p, before)


@pytest.mark.guarantee(id="asam-range")
@pytest.mark.parametrize("rho", [0.05, -0.05])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_a_tiny_norm_does_not_make_the_scale_infinite(step, rho, adaptive):
    """1e-44 is a subnormal float32; a scale of infinity times a gradient of 0 would be NaN."""
    p = torch.nn.Parameter(torch.ones(100))
    p.grad = torch.zeros(100)
    p.grad[::2] = 1e-44
    s = step([p], options=[{"rho": abs(rho), "adaptive": adaptive, "maximize": rho < 0}])
    s.grad_norm()
    assert 0.0 < s.perturb(eps=0.0) < 1.5e-40
    moved = p.detach() - 1.0
    assert torch.equal(moved[1::2], torch.zeros(50))
    assert bool(moved.isfinite().all())
    assert bool((moved[::2] * rho >= 0).all())


@pytest.mark.float64
def test_a_tiny_norm_of_float64_does_not_make_the_scale_infinite_either(step, kernels):
    p = torch.nn.Parameter(torch.ones(100, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    s = step([p])
    s.grad_norm()
    s.partials.zero_()
    s.partials[0] = 5e-324  # the norm is 2e-162, rho 1e155 times the largest number times that
    s.options.values[0] = 1e155
    s.perturb(eps=0.0)
    assert torch.equal(p, torch.ones_like(p))
