"""flatten=True: parameters and gradients are views of flat buffers, and everything else is as without."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import SmallNet, batches, buckets_of, give, make_params, same_bits, train, values
from torch.nn.functional import cross_entropy

from sam_fast import SAM, Schedule


def in_one_buffer(tensors) -> bool:
    """Whether they are views of the same memory."""
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_parameters_and_gradients_are_views_of_one_buffer():
    params = make_params([5, 1000, 17])
    SAM(params, lr=0.1, flatten=True)
    assert in_one_buffer(params)
    assert in_one_buffer([p.grad for p in params])


def test_values_gradients_shapes_and_strides_are_kept():
    sources = [
        torch.randn(3, 4),
        torch.randn(4, 5).t(),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(()),
    ]
    params = [torch.nn.Parameter(s.clone(memory_format=torch.preserve_format)) for s in sources]
    gradients = [torch.randn_like(s) for s in sources]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone(memory_format=torch.preserve_format)
    SAM(params, lr=0.1, flatten=True)
    for p, s, g in zip(params, sources, gradients, strict=True):
        assert torch.equal(p, s)
        assert torch.equal(p.grad, g)
        assert p.stride() == s.stride() == p.grad.stride()


def test_one_tensor_per_group():
    params = make_params([5, 1000, 17, 33, 2])
    groups = [{"params": params[:2]}, {"params": params[2:], "rho": 0.1}]
    (bucket,) = buckets_of(SAM(groups, lr=0.1, flatten=True))
    assert len(bucket.tensors) == 2
    assert bucket.groups == [0, 1]


@pytest.mark.parametrize("adaptive", [False, True])
def test_training_gives_the_same_bits_as_without(adaptive):
    model = SmallNet()
    twin = copy.deepcopy(model)
    options = {
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 1e-3,
        "adaptive": adaptive,
        "rho": 0.5 if adaptive else 0.05,
    }
    # The norm's partial sums are cut differently, so a last bit of it may differ; the weights are float32 and do not
    # show it here.
    train(model, SAM(model.parameters(), **options), batches(20))
    train(twin, SAM(twin.parameters(), flatten=True, **options), batches(20))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_addresses_stay_and_gradients_accumulate_in_place():
    model = SmallNet()
    optimizer = SAM(model.parameters(), lr=0.05, flatten=True)
    before = [(p.data_ptr(), p.grad.data_ptr()) for p in model.parameters()]
    train(model, optimizer, batches(3))
    assert [(p.data_ptr(), p.grad.data_ptr()) for p in model.parameters()] == before


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_zeroes_and_keeps_the_views(set_to_none):
    params = make_params([5, 1000])
    optimizer = SAM(params, lr=0.1, flatten=True)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    assert in_one_buffer([p.grad for p in params])


def test_gradient_set_to_none_is_not_counted_and_is_attached_again():
    params = make_params([50, 60])
    optimizer = SAM(params, lr=0.1, flatten=True)
    before = values(params)
    params[0].grad = None
    optimizer.first_step()
    assert float(optimizer.grad_norm) == pytest.approx(float(params[1].grad.norm()), rel=1e-6)
    assert torch.equal(params[0], before[0])
    optimizer.restore()
    assert same_bits(values(params), before)
    optimizer.zero_grad()
    assert params[0].grad is not None


def test_gradient_that_was_replaced_is_taken_over():
    params = make_params([50, 60])
    optimizer = SAM(params, lr=0.1, flatten=True)
    params[0].grad = torch.ones(50)
    optimizer.first_step()
    exact = (50 + float(params[1].grad.double().square().sum())) ** 0.5
    assert float(optimizer.grad_norm) == pytest.approx(exact, rel=1e-6)
    assert in_one_buffer([p.grad for p in params])


def test_a_gradient_whose_data_was_replaced_is_taken_over():
    """As clipping by value through ``.data`` does: the gradient is the same object, with other memory."""
    results = []
    for flatten in (False, True):
        params = make_params([50, 60, 7])
        optimizer = SAM(params, lr=0.1, momentum=0.9, flatten=flatten)
        found = []
        for seed in range(3):
            for step in (optimizer.first_step, optimizer.second_step):
                for p, q in zip(params, make_params([50, 60, 7], seed=seed), strict=True):
                    p.grad.copy_(q.grad)
                    p.grad.data = p.grad.data.clamp(-0.005, 0.005)
                step()
                found += values(params)
        results.append(found)
    assert same_bits(*results)


def test_model_zero_grad_between_the_steps_is_harmless():
    model = SmallNet()
    optimizer = SAM(model.parameters(), lr=0.05, flatten=True)
    twin = copy.deepcopy(model)
    other = SAM(twin.parameters(), lr=0.05, flatten=True)
    for x, y in batches(5):
        for m, o, zero_grad in ((model, optimizer, model.zero_grad), (twin, other, other.zero_grad)):
            cross_entropy(m(x), y).backward()
            o.first_step()
            zero_grad()
            with o.second_pass(m):
                cross_entropy(m(x), y).backward()
            o.second_step()
            zero_grad()
    assert same_bits(list(model.parameters()), list(twin.parameters()))


def test_frozen_parameter_has_no_gradient_and_does_not_decay():
    params = make_params([50, 60])
    params[0].requires_grad_(False)
    params[0].grad = None
    optimizer = SAM(params, lr=0.1, weight_decay=0.1, flatten=True)
    before = values(params)
    optimizer.first_step()
    optimizer.second_step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])


@pytest.mark.parametrize("when", ["between the passes", "before a step that does not perturb"])
def test_what_is_frozen_while_its_gradient_is_zero_is_not_stepped(when):
    """Without flatten that gradient is None. Weight decay and momentum would move it."""
    between = when == "between the passes"
    results = []
    for flatten in (True, False):
        params, schedule = make_params([50, 60], grads=False), None if between else Schedule(every=2)
        options = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "schedule": schedule, "flatten": flatten}
        optimizer = SAM(params, **options)
        give(params, 0)
        optimizer.first_step(zero_grad=True)
        if not between:
            give(params, 1)
            optimizer.second_step(zero_grad=True)
        params[0].requires_grad_(False)
        give(params[1:], 2)
        optimizer.second_step(zero_grad=True)
        results.append(values(params))
    assert same_bits(*results)


@pytest.mark.parametrize("how", ["appended", "exchanged"])
def test_the_gradient_of_a_parameter_that_came_between_the_passes_is_let_go(how):
    params = make_params([50, 60])
    optimizer = SAM(params, lr=0.1, flatten=True)
    optimizer.first_step(zero_grad=True)
    (new,) = make_params([70])
    listed = optimizer.param_groups[0]["params"]
    listed[len(listed) if how == "appended" else 1 :] = [new]
    give(listed, 1)
    optimizer.second_step(zero_grad=True)
    assert new.grad is None
    give(listed, 2)  # now it lies in a flat buffer
    optimizer.first_step(zero_grad=True)
    assert not new.grad.any()
    optimizer.restore()


def test_what_is_frozen_later_stays_in_its_buffer_and_moves_no_other():
    params = make_params([50, 60, 70])
    left_out = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    optimizer = SAM([*params, left_out], lr=0.1, flatten=True)
    addresses = [p.data_ptr() for p in params]
    params[0].requires_grad_(False)
    params[0].grad = None
    optimizer.add_param_group({"params": make_params([20])})
    assert [p.data_ptr() for p in params] == addresses
    left_out.requires_grad_()
    left_out.grad = torch.ones(4)
    before = values(params)
    optimizer.first_step()
    assert [p.data_ptr() for p in params] == addresses
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [True, False, False]


@pytest.mark.guarantee(id="addresses")
def test_a_copy_made_while_a_parameter_is_frozen_moves_it_when_it_is_not():
    params = make_params([50, 60])
    optimizer = SAM(params, lr=0.1, flatten=True)
    params[0].requires_grad_(False)
    params[0].grad = None
    params, optimizer = copy.deepcopy((params, optimizer))
    frozen, other = (p.data_ptr() for p in params)
    for p in params:
        p.requires_grad_()
        p.grad = torch.ones_like(p)
    before = values(params)
    optimizer.first_step()
    assert params[0].data_ptr() != frozen  # frozen, it cost no slot
    assert params[1].data_ptr() == other
    optimizer.restore()
    assert same_bits(values(params), before)


def test_model_moved_to_another_dtype_is_flattened_again():
    model = SmallNet()
    optimizer = SAM(model.parameters(), lr=0.05, flatten=True)
    train(model, optimizer, batches(1))
    model.double()
    x, y = batches(1)[0]
    cross_entropy(model(x.double()), y).backward()
    optimizer.first_step()
    assert in_one_buffer(model.parameters())
    optimizer.restore()


def test_added_group_does_not_move_the_others():
    params = make_params([50, 60, 70])
    optimizer = SAM(params[:2], lr=0.1, flatten=True)
    addresses = [p.data_ptr() for p in params[:2]]
    optimizer.add_param_group({"params": params[2:], "rho": 0.3})
    assert [p.data_ptr() for p in params[:2]] == addresses
    before = values(params)
    optimizer.first_step()
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    optimizer.restore()
    assert same_bits(values(params), before)
