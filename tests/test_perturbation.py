"""Weights: restored bit for bit whatever happens, addresses kept, norm and e correct."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import SmallNet, batches, each_dtype, make_params, same_bits, train, values
from torch import nn
from torch.nn.functional import cross_entropy

from sam_fast import SAM
from sam_fast.reference import ReferenceSAM


@pytest.mark.guarantee(id="addresses")
def test_addresses_never_change(make):
    model = SmallNet()
    optimizer = make(model.parameters(), momentum=0.9)
    before = [p.data_ptr() for p in model.parameters()]
    for x, y in batches(3):
        cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        assert [p.data_ptr() for p in model.parameters()] == before
        cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        assert [p.data_ptr() for p in model.parameters()] == before


def test_restore_gives_the_step_up(make):
    params = make_params([10, 20])
    optimizer = make(params)
    before = values(params)
    optimizer.restore()
    optimizer.first_step()
    optimizer.restore()
    optimizer.restore()
    assert same_bits(values(params), before)
    optimizer.first_step()
    optimizer.second_step()


@pytest.mark.guarantee(id="restore-vanishing-gradients")
@pytest.mark.parametrize("zero", [False, True], ids=["kept", "vanished"])
def test_gradient_that_vanishes_between_the_passes(make, zero):
    params = make_params([10, 20])
    optimizer = make(params, lr=0.0)
    before = values(params)
    optimizer.first_step()
    if zero:
        params[0].grad = None
    optimizer.second_step()
    assert same_bits(values(params), before)


@pytest.mark.guarantee(id="restore-vanishing-gradients")
def test_gradient_that_appears_between_the_passes(make):
    params = make_params([10, 20])
    params[0].grad = None
    optimizer = make(params, lr=1.0)
    before = values(params)
    optimizer.first_step()
    params[0].grad = torch.ones(10)
    optimizer.second_step()
    torch.testing.assert_close(params[0].detach(), before[0] - 1.0)


@pytest.mark.guarantee(id="zero-gradients")
def test_no_gradient_at_all(make):
    params = make_params([10, 20], grads=False)
    optimizer = make(params)
    before = values(params)
    optimizer.first_step()
    assert optimizer.perturbed
    assert float(optimizer.grad_norm) == 0.0
    optimizer.second_step()
    assert same_bits(values(params), before)


@pytest.mark.guarantee(id="non-finite-gradients")
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("index", [0, 500, 999])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_gradient_moves_nothing(make, where, index, value):
    params = make_params([1000, 1000, 1000])
    params[where].grad[index] = value
    optimizer = make(params, lr=0.0)
    before = values(params)
    optimizer.first_step()
    assert same_bits(values(params), before)
    assert not math.isfinite(float(optimizer.grad_norm))
    optimizer.restore()
    assert same_bits(values(params), before)


@pytest.mark.guarantee(id="zero-gradients")
@each_dtype
@pytest.mark.parametrize("perturb_eps", [1e-12, 0.0], ids=["", "without-eps"])
def test_zero_gradient_moves_nothing(make, dtype, perturb_eps):
    params = make_params([100, 7], dtype)
    for p in params:
        p.grad.zero_()
    # without perturb_eps rho divided by a norm of 0 is infinity, or where rho is 0 too, NaN
    groups = [{"params": params[:1]}, {"params": params[1:], "rho": 0.0}]
    optimizer = make(groups, lr=0.0, perturb_eps=perturb_eps)
    before = values(params)
    optimizer.first_step()
    assert same_bits(values(params), before)
    optimizer.second_step()
    assert same_bits(values(params), before)


@pytest.mark.guarantee(id="norm-precision")
@pytest.mark.float16
def test_large_float16_gradients_do_not_overflow_the_norm(make):
    params = make_params([1000], torch.float16)
    params[0].grad.fill_(1000.0)
    optimizer = make(params)
    optimizer.first_step()
    assert float(optimizer.grad_norm) == pytest.approx(1000.0 * math.sqrt(1000), rel=1e-6)


@pytest.mark.guarantee(id="maximize")
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_maximize_descends(make, adaptive):
    up, down = make_params([100]), make_params([100])
    start = values(up)[0]
    make(up, adaptive=adaptive).first_step()
    make(down, adaptive=adaptive, maximize=True).first_step()
    torch.testing.assert_close(up[0] - start, start - down[0], rtol=1e-3, atol=1e-7)
    along = [float(((p[0].detach() - start) * p[0].grad).sum()) for p in (up, down)]
    assert along[0] > 0 > along[1]


@pytest.mark.guarantee(id="maximize")
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_complex_parameters(flatten, adaptive):
    """T = |w| + eta, and |e| = rho for SAM."""
    w = torch.randn(50, dtype=torch.complex64)
    p = nn.Parameter(w.clone())
    p.grad = torch.randn(50, dtype=torch.complex64)
    g = p.grad.to(torch.complex128)
    optimizer = SAM([p], lr=0.1, rho=0.1, adaptive=adaptive, eta=0.01, flatten=flatten)
    optimizer.first_step()
    t = w.to(torch.complex128).abs() + 0.01 if adaptive else torch.ones(50, dtype=torch.float64)
    norm = (t * g).abs().square().sum().sqrt()
    want = w.to(torch.complex128) + 0.1 * t * t * g / norm
    torch.testing.assert_close(p.detach().to(torch.complex128), want, rtol=1e-6, atol=1e-6)
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    optimizer.restore()
    assert torch.equal(p, w)


@pytest.mark.guarantee(id="one-norm")
def test_the_norm_is_one_number_over_all_groups(make, backend):
    """A group with rho=0 still lowers the others' e, as in the reference; one with perturb=False does not exist for
    SAM.
    """
    for options, counted in (({"rho": 0.0}, 3), ({"perturb": False}, 2)):
        params = make_params([10, 20, 30])
        exact = [nn.Parameter(p.detach().double()) for p in params]
        for p, q in zip(params, exact, strict=True):
            q.grad = p.grad.double()
        optimizer = make([{"params": params[:2]}, {"params": params[2:], **options}])
        reference = ReferenceSAM([{"params": exact[:2]}, {"params": exact[2:], **options}], torch.optim.SGD, lr=0.1)
        optimizer.first_step()
        reference.first_step()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params[:counted]))
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-12 if backend == "cpu" else 1e-6)
        for p, q in zip(params, exact, strict=True):
            torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-6, atol=1e-7)


def test_options_are_read_anew_in_every_step(make):
    params = make_params([100])
    optimizer = make(params, lr=0.0, rho=0.1)
    start = values(params)[0]
    moved = []
    for rho in (0.1, 0.3, 0.0):
        optimizer.param_groups[0]["rho"] = rho
        optimizer.first_step()
        moved.append(float((params[0] - start).norm()))
        optimizer.second_step()
    assert moved == pytest.approx([0.1, 0.3, 0.0], rel=1e-5)


@pytest.mark.guarantee(id="stale-graph")
def test_a_stale_graph_is_an_error(make):
    """Version counters: backward through a graph that was built before the weights moved must not give a gradient."""
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = make(layers.parameters())
    loss = layers(torch.ones(1, 3)).sum()
    loss.backward(retain_graph=True)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True)
    loss = layers(torch.ones(1, 3)).sum()
    optimizer.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_without_a_gradient_keep_their_version(backend):
    params = make_params([10, 20])
    params[0].grad = None
    optimizer = SAM(params, lr=0.1, backend=backend)
    version = params[0]._version
    optimizer.first_step()
    optimizer.restore()
    assert params[0]._version == version


def test_a_parameter_that_was_appended_to_a_named_group_is_called_by_its_number():
    optimizer = SAM(nn.Linear(3, 2).named_parameters(), lr=0.1)
    added = nn.Parameter(torch.ones(4))
    optimizer.param_groups[0]["params"].append(added)
    added.grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 2 of group 0 .*sparse gradient"):
        optimizer.first_step()


@pytest.mark.guarantee(id="misuse")
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_sparse_gradient_is_refused_and_nothing_has_moved(make, bad):
    params = [*make_params([30, 40]), *make_params([50], torch.float64)]
    params[bad].grad = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, dtype=params[bad].dtype), params[bad].shape)
    sparse, params[bad].grad = params[bad].grad, None
    optimizer = make(params)
    params[bad].grad = sparse
    before = values(params)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.first_step()
    assert same_bits(values(params), before)
    assert not optimizer.perturbed
    params[bad].grad = torch.zeros(params[bad].shape, dtype=params[bad].dtype)
    optimizer.first_step()
    optimizer.restore()
    assert same_bits(values(params), before)


@pytest.mark.guarantee(id="layouts")
@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(4, 5, 6, 7).contiguous(memory_format=torch.channels_last),
        torch.randn(40, 50).t(),
        torch.randn(()),
        torch.randn(0, 3),
        torch.randn(20)[::2],
        torch.randn(6, 7)[:, 1:5],
    ],
    ids=["channels_last", "transposed", "0-dim", "empty", "strided", "sliced"],
)
@pytest.mark.parametrize("layout", ["as-weight", "contiguous", "reversed", "expanded"])
def test_layouts_of_weights_and_gradients(flatten, weight, layout):
    p = nn.Parameter(torch.empty_strided(weight.shape, weight.stride()).copy_(weight))
    other = make_params([1000])[0]
    g = torch.randn(weight.shape)
    backwards = tuple(range(g.dim()))[::-1]
    p.grad = {
        "as-weight": lambda: torch.empty_strided(weight.shape, weight.stride()).copy_(g),
        "contiguous": lambda: g.clone(),
        "reversed": lambda: g.clone().permute(backwards).contiguous().permute(backwards),
        "expanded": lambda: torch.tensor(0.5).expand(weight.shape),
    }[layout]()
    g = p.grad.clone()
    optimizer = SAM([p, other], lr=0.0, rho=0.1, flatten=flatten)
    optimizer.first_step()
    norm = math.hypot(float(g.double().norm()), float(other.grad.double().norm()))
    torch.testing.assert_close(p.detach().double(), weight.double() + 0.1 * g.double() / norm, rtol=1e-6, atol=1e-7)
    optimizer.second_step()
    assert torch.equal(p, weight)


@pytest.mark.guarantee(id="gradient-layout")
def test_gradient_of_another_dtype_is_brought_to_its_parameters(backend):
    p = make_params([100], torch.bfloat16)[0]
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this PyTorch ties a gradient's dtype to its parameter's")
    g = torch.randn(100)
    p.grad = None
    p.grad_dtype = torch.float32
    p.grad = g
    before = values([p])
    optimizer = SAM([p], lr=0.1, backend=backend)
    optimizer.first_step()
    assert float(optimizer.grad_norm) == pytest.approx(float(g.norm()), rel=1e-2)
    optimizer.restore()
    assert same_bits(values([p]), before)


@pytest.mark.guarantee(id="gradient-layout")
def test_gradient_of_another_shape_is_refused_and_nothing_has_moved(make):
    """Autograd never makes one, but ``grad.data = ...`` can, and PyTorch would broadcast it."""
    params = make_params([6, 5])
    optimizer = make(params)
    before = values(params)
    params[1].grad = torch.ones(5)  # with flatten=True one that has yet to be taken over
    params[1].grad.data = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 .* has a gradient of another shape, \(1,\)"):
        optimizer.first_step()
    assert same_bits(values(params), before)


def test_parameter_that_is_listed_twice_is_perturbed_once(backend):
    p = make_params([100])[0]
    start = values([p])[0]
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = SAM([p, p], lr=0.0, rho=0.1, backend=backend)
    optimizer.first_step()
    assert float((p - start).norm()) == pytest.approx(0.1, rel=1e-5)
    optimizer.restore()
    assert torch.equal(p, start)


@pytest.mark.guarantee(id="moved-weights")
def test_weights_given_other_memory_between_the_steps(make):
    params = make_params([100, 20_000])
    optimizer = make(params, lr=0.0)
    optimizer.first_step()
    optimizer.second_step()
    for p in params:
        p.data = p.data.clone().add_(1.0)
    before = values(params)
    optimizer.first_step()
    assert not same_bits(values(params), before)
    optimizer.second_step()
    assert same_bits(values(params), before)


@pytest.mark.parametrize(
    "change", [lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.to(memory_format=torch.channels_last)]
)
def test_model_converted_after_construction(make, change):
    model = SmallNet()
    optimizer = make(model.parameters(), lr=0.01)
    x, y = batches(1)[0]
    for _ in range(2):
        x = x.to(next(model.parameters()).dtype)
        cross_entropy(model(x), y).backward()
        before = values(list(model.parameters()))
        optimizer.first_step()
        assert not same_bits(values(list(model.parameters())), before)
        optimizer.restore()
        assert same_bits(values(list(model.parameters())), before)
        optimizer.zero_grad()
        change(model)


def test_deepcopied_model_trains_alike(make):
    """With its optimizer, in mid-training."""

    model = SmallNet()
    optimizer = make(model.parameters(), momentum=0.9)
    train(model, optimizer, batches(2))
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, batches(3, seed=1))
    train(twin, other, batches(3, seed=1))
    assert same_bits(list(model.parameters()), list(twin.parameters()))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
