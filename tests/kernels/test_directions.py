"""Directions that are not gradients: any list of tensors, with the bits that the same tensors give as gradients."""

from __future__ import annotations

import pytest
import torch
from cases import CHUNK, each_dtype, make_params, same_bits, values
from torch import Tensor

SIZES = [0, 1, 17, 300, CHUNK + 5]


def directions(dtype: torch.dtype) -> list[Tensor | None]:
    """Of each layout: as its tensor, missing, with other strides, in another dtype."""
    found: list[Tensor | None] = [p.detach() for p in make_params(SIZES, dtype, seed=7)]
    found[2] = None
    assert found[3] is not None
    found[3] = torch.stack([found[3], found[3]], -1)[..., 0]
    found[1] = found[1].to(torch.float64 if dtype != torch.float64 else torch.float32)
    return found


@each_dtype
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_any_direction_has_the_bits_of_a_gradient(step, dtype, adaptive):
    options = [{"adaptive": adaptive, "eta": 0.01, "rho": 0.3}]
    along, as_gradients = make_params(SIZES, dtype), make_params(SIZES, dtype)
    for p, direction in zip(as_gradients, directions(dtype), strict=True):
        p.grad = None
        if direction is not None:
            p.grad = torch.zeros_like(p)
            p.grad.data = direction
    for p in along[:2]:
        p.grad = None  # gradients are not looked at
    given, gradients = step(along, options=options), step(as_gradients, options=options)
    assert given.first_step(directions(dtype)) == gradients.first_step()
    assert same_bits(values(along), values(as_gradients))
    before = values(make_params(SIZES, dtype))
    assert not same_bits(values(along), before)
    given.restore()
    assert same_bits(values(along), before)


def test_groups_that_are_not_perturbed_stay(step):
    params = make_params([30, 40])
    before = values(params)
    s = step(params, [0, 1], [{"rho": 1.0}, {"perturb": False}])
    norm = s.first_step([torch.ones(30), torch.ones(40)])
    assert norm == pytest.approx(30**0.5, rel=1e-6)
    assert same_bits(values(params[1:]), before[1:])
    assert not same_bits(values(params[:1]), before[:1])


@pytest.mark.parametrize("bad", [torch.ones(3).to_sparse(), torch.ones(4)], ids=["sparse", "shape"])
def test_a_direction_that_does_not_fit_is_refused(step, bad):
    s = step(make_params([3]))
    with pytest.raises(RuntimeError, match="gradient"):
        s.bucket.collect(s.options, [bad])
