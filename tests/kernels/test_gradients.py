"""Gradients with strides or a dtype of their own, and those that are refused."""

from __future__ import annotations

import pytest
import torch
from cases import CHUNK, each_dtype, make_params, same_bits, values

SIZES = [0, 1, 17, 300, CHUNK + 5]


@each_dtype
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_any_gradient_has_the_bits_of_one_laid_out_as_its_tensor(step, dtype, adaptive):
    options = [{"adaptive": adaptive, "eta": 0.01, "rho": 0.3}]
    odd, usual = make_params(SIZES, dtype), make_params(SIZES, dtype)
    for params in (odd, usual):
        params[2].grad = None
    odd[3].grad = torch.stack([odd[3].grad, odd[3].grad], -1)[..., 0]
    odd[1].grad.data = odd[1].grad.to(torch.float64 if dtype != torch.float64 else torch.float32)
    if dtype == torch.float64:
        usual[1].grad.copy_(odd[1].grad)
    found, expected = step(odd, options=options), step(usual, options=options)
    assert found.first_step() == expected.first_step()
    assert same_bits(values(odd), values(usual))
    before = values(make_params(SIZES, dtype))
    assert not same_bits(values(odd), before)
    found.restore()
    assert same_bits(values(odd), before)


def test_groups_that_are_not_perturbed_stay(step):
    params = make_params([30, 40])
    before = values(params)
    for p in params:
        p.grad.fill_(1.0)
    s = step(params, [0, 1], [{"rho": 1.0}, {"perturb": False}])
    assert s.first_step() == pytest.approx(30**0.5, rel=1e-6)
    assert same_bits(values(params[1:]), before[1:])
    assert not same_bits(values(params[:1]), before[:1])


@pytest.mark.parametrize("bad", [torch.ones(3).to_sparse(), torch.ones(4)], ids=["sparse", "shape"])
def test_a_gradient_that_does_not_fit_is_refused(step, bad):
    (p,) = make_params([3])
    if bad.is_sparse:
        p.grad = bad
    else:
        p.grad.data = bad  # an assignment to .grad would be refused
    with pytest.raises(RuntimeError, match="gradient"):
        step([p]).first_step()
