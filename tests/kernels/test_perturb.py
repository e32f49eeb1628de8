"""perturb: w + e against float64, the backup bit for bit, and nothing outside the rows touched."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, EPSILON, SIZES, make_params, same_bits, values

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def expected(w, g, norm, rho=0.05, adaptive=False, eta=0.0, eps=1e-12):
    """w + e in float64."""
    w, g = w.double(), g.double()
    t = w.abs() + eta if adaptive else torch.ones_like(w)
    return w + t * t * g * (rho / (norm + eps))


def assert_climbed(moved, w, g, norm, **options) -> None:
    want = expected(w, g, norm, **options)
    e = (want - w.double()).abs()
    # Half a unit in the last place for storing w + e, and a few roundings in the arithmetic's own dtype (float32, or float64) of e.
    arithmetic = torch.finfo(torch.float64 if w.dtype == torch.float64 else torch.float32).eps
    stored = torch.finfo(w.dtype).tiny if w.dtype == torch.float16 else 0.0  # subnormal halves are spaced absolutely
    bound = 0.5 * EPSILON[w.dtype] * want.abs() + 4 * arithmetic * (e + want.abs()) + stored
    assert bool(((moved.double() - want).abs() <= bound).all())


@dtypes
@pytest.mark.parametrize("size", SIZES)
def test_one_tensor(step, dtype, size):
    params = make_params([size], dtype)
    before = values(params)
    s = step(params)
    norm = s.climb()
    assert_climbed(params[0].detach(), before[0], params[0].grad, norm)
    s.restore()
    assert same_bits(values(params), before)


@dtypes
@pytest.mark.parametrize("eta", [0.0, 0.01])
def test_adaptive(step, dtype, eta):
    params = make_params(SIZES, dtype)
    before = values(params)
    s = step(params, options=[{"rho": 0.5, "adaptive": True, "eta": eta}])
    norm = s.climb()
    for p, w in zip(params, before, strict=True):
        assert_climbed(p.detach(), w, p.grad, norm, rho=0.5, adaptive=True, eta=eta)


def test_groups_are_looked_up_per_row(step):
    params = make_params(SIZES)
    before = values(params)
    groups = [i * 3 // len(params) for i in range(len(params))]
    options = [{"rho": 0.1}, {"rho": 0.7, "adaptive": True, "eta": 0.1}, {"rho": 0.0}]
    norm = (s := step(params, groups, options)).climb()
    for p, w, group in zip(params, before, groups, strict=True):
        assert_climbed(p.detach(), w, p.grad, norm, **options[group])
    s.restore()
    assert same_bits(values(params), before)


def test_norm_is_written_out(step):
    params = make_params([100, 40_000])
    s = step(params)
    assert s.climb() == pytest.approx(float(s.partials.sum().sqrt()), rel=1e-14)


def test_maximize_goes_the_other_way(step):
    up, down = make_params([1000]), make_params([1000])
    step(up).climb()
    step(down, options=[{"maximize": True}]).climb()
    start = make_params([1000])[0]
    assert torch.allclose(up[0] - start, start - down[0], atol=1e-7)
    assert not torch.equal(up[0], down[0])


def test_eps_is_added_to_the_norm(step):
    params = make_params([1000])
    before = values(params)
    s = step(params)
    s.grad_norm()
    norm = s.perturb(eps=1.0)
    assert_climbed(params[0].detach(), before[0], params[0].grad, norm, eps=1.0)


@dtypes
def test_zero_gradient_moves_nothing(step, dtype):
    params = make_params(SIZES, dtype)
    for p in params:
        p.grad.zero_()
    before = values(params)
    assert step(params).climb() == 0.0
    assert same_bits(values(params), before)


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_norm_moves_nothing_and_restores(step, dtype, value):
    params = make_params([5, 40_000, 17], dtype)
    params[1].grad[39_999] = value
    before = values(params)
    s = step(params)
    assert not math.isfinite(s.climb())
    assert same_bits(values(params), before)
    for p in params:
        p.data.fill_(7.0)
    s.restore()
    assert same_bits(values(params), before)


def test_rows_without_gradient_are_neither_moved_nor_saved(step, kernels):
    params = make_params([100, 20_000, 300])
    params[1].grad = None
    s = step(params)
    s.climb()
    assert kernels.saved(s.bucket) == [0, 2]
    params[1].data.fill_(3.0)
    s.restore()
    assert bool((params[1] == 3.0).all())
    assert not kernels.saved(s.bucket)


@dtypes
@pytest.mark.parametrize("size", [1, 15, 16, 17, 16_384, 16_385, 33_001])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_writes_nothing_outside_the_row(step, dtype, size, shift):
    """Rows at addresses of every alignment inside a guarded tensor: the elements before and behind keep their values."""
    around = torch.full((shift + size + 64,), 9.0, dtype=dtype)
    row = around[shift : shift + size]
    row.copy_(make_params([size], dtype)[0].detach())
    row.grad = make_params([size], dtype)[0].grad
    before = row.clone()
    s = step([row])
    norm = s.climb()
    assert_climbed(row, before, row.grad, norm)
    s.restore()
    assert same_bits([row], [before])
    assert bool((around[:shift] == 9.0).all())
    assert bool((around[shift + size :] == 9.0).all())


@dtypes
def test_backup_holds_the_weights_in_their_slots(step, dtype):
    params = make_params([5, 40_000, 0, 17], dtype)
    before = values(params)
    s = step(params)
    s.climb()
    assert same_bits(s.bucket.flat_rows, before)


def test_streaming_and_ordinary_stores_agree(step):
    """A large bucket is backed up past the caches, a small one through them."""
    small, large = make_params([1003]), make_params([1003, 2_000_000])
    large[1].grad.zero_()
    large[1].data.zero_()
    step(small).climb()
    step(large).climb()
    assert torch.equal(small[0], large[0])


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
