"""Parameters of every kind, trained as torch's own optimizer trains them: groups, layouts, sizes, frozen ones."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from cases import buckets_of, give, make_params, normal, same_bits, same_step, values
from torch import nn
from torch_conformance import bases, plain_step, sam_step

from sam_fast import SAM, backends
from sam_fast.backends.bucket import CHUNK
from sam_fast.backends.native import FIELDS


@pytest.mark.guarantee(id="copies")
@bases
def test_learning_rate_and_weight_decay_of_each_group(base: type[torch.optim.Optimizer], flatten: bool) -> None:
    """Also of a group that is added in mid-training, whose state begins there."""
    params, own = make_params([17, 30, 5], grads=False), make_params([17, 30, 5], grads=False)

    def groups(of: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": of[:1], "lr": 0.3, "weight_decay": 0.1}, {"params": of[1:2]}]

    options: dict[str, Any] = {
        "lr": 0.01,
        "weight_decay": 0.02,
        **({"momentum": 0.9} if base is torch.optim.SGD else {}),
    }
    optimizer, plain = SAM(groups(params), base, flatten=flatten, **options), base(groups(own), **options)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": params[2:], "lr": 0.2})
            plain.add_param_group({"params": own[2:], "lr": 0.2})
        here = 3 if step >= 3 else 2
        sam_step(optimizer, params[:here], step)
        plain_step(plain, own[:here], step)
    assert same_step(base, params, own)


@pytest.mark.guarantee(id="layouts")
@bases
def test_a_parameter_without_dimensions(base: type[torch.optim.Optimizer], backend: str, flatten: bool) -> None:
    params = [nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3))]
    optimizer = SAM(params, base, lr=0.1, rho=0.5, backend=backend, flatten=flatten)
    own = [nn.Parameter(p.detach().clone()) for p in params]
    plain = base(own, lr=0.1)
    for step in range(2):
        before = values(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.first_step()
        for p, w in zip(params, before, strict=True):
            assert torch.allclose(p, w + 0.5 / 2, rtol=0, atol=1e-6)  # the norm of four ones is 2
        give(params, step)
        optimizer.second_step()
        plain_step(plain, own, step)
    assert same_step(base, params, own)
    assert params[0].shape == ()


@pytest.mark.guarantee(id="layouts")
@bases
def test_parameters_that_are_not_contiguous(base: type[torch.optim.Optimizer], backend: str, flatten: bool) -> None:
    """Transposed, channels_last, with gaps (the torch backend's), a slice: trained as their contiguous copies are."""
    generator = torch.Generator().manual_seed(0)
    kinds = [
        normal((5, 3), generator).t(),
        normal((2, 3, 4, 5), generator).to(memory_format=torch.channels_last),
        normal((4, 6), generator)[:, 1:],
        normal((40,), generator)[3:20],
    ]
    if backend != "torch" and not flatten:
        del kinds[2]
    params, own = [nn.Parameter(t) for t in kinds], [nn.Parameter(t.contiguous().clone()) for t in kinds]
    optimizer, plain = (
        SAM(params, base, lr=0.1, backend=backend, flatten=flatten),
        SAM(own, base, lr=0.1, backend=backend, flatten=flatten),
    )
    for step in range(3):
        give(params, step)
        give(own, step)
        optimizer.first_step()
        plain.first_step()
        # the norm is summed in another order
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(params, own, strict=True))
        give(params, 50 + step)
        give(own, 50 + step)
        optimizer.second_step()
        plain.second_step()
    assert same_step(base, params, own)


@pytest.mark.guarantee(id="copies")
@bases
def test_frozen_then_unfrozen(base: type[torch.optim.Optimizer], backend: str, flatten: bool) -> None:
    """A frozen layer neither moves nor counts; unfrozen it goes on with the state that it had."""
    params, own = make_params([8, 6], grads=False), make_params([8, 6], grads=False)
    optimizer, plain = SAM(params, base, lr=0.1, backend=backend, flatten=flatten), base(own, lr=0.1)
    for step in range(6):
        trained = [0] if 2 <= step < 4 else [0, 1]
        for group in (params, own):
            group[1].requires_grad_(1 in trained)
        optimizer.zero_grad()
        plain.zero_grad()
        frozen = values(params)[1] if len(trained) == 1 else None
        give([params[i] for i in trained], 100 + step)
        optimizer.first_step()
        give([params[i] for i in trained], step)
        give([own[i] for i in trained], step)
        optimizer.second_step()
        plain.step()
        assert frozen is None or same_bits([params[1]], [frozen])
    assert same_step(base, params, own)


@pytest.mark.guarantee(id="layouts")
def test_more_than_two_to_the_31_elements_on_the_meta_device() -> None:
    """Sizes, slots and chunks are 64-bit numbers."""
    size = 2**31 + 5
    p = nn.Parameter(torch.empty(size, dtype=torch.bfloat16, device="meta"))
    q = nn.Parameter(torch.empty(7, dtype=torch.bfloat16, device="meta"))
    for parameter in (p, q):
        parameter.grad = torch.empty_like(parameter)
    optimizer = SAM([p, q], lr=0.1)
    (bucket,) = buckets_of(optimizer)
    assert bucket.slots == [0, 2**31 + 32]
    index, _, begin, count, slot = bucket.chunks[-2].tolist()
    assert (index, begin + count, slot) == (0, size, begin)
    assert bucket.chunks[-1].tolist() == [1, 0, 0, 7, 2**31 + 32]
    optimizer.first_step()
    optimizer.second_step()


@pytest.mark.guarantee(id="layouts")
def test_kernels_reach_elements_beyond_two_to_the_31() -> None:
    """The memory is not there until it is used: only the last two chunks are worked on."""
    _cpu = pytest.importorskip("sam_fast._cpu")
    size = 2**31 + CHUNK + 5
    try:
        weight, grad, backup = (torch.empty(size, dtype=torch.float16) for _ in range(3))
    except RuntimeError:
        pytest.skip("needs 12 GiB of address space")
    bucket = backends.BACKENDS["cpu"].bucket([weight], [0])
    last = bucket.chunks[-2:].contiguous()
    assert last[0, 2] >= 2**31
    tail = slice(int(last[0, 2]), size)
    weight[tail], grad[tail] = 1.0, 2.0
    addresses = torch.tensor([weight.data_ptr(), grad.data_ptr(), 0], dtype=torch.int64)
    weights, along, saved = (addresses[i : i + 1].data_ptr() for i in range(3))
    facts = {"dtype": 3, "itemsize": 2, "num_tensors": 1, "num_chunks": 2, "tensors": bucket.tensor_table.data_ptr()}
    facts |= {
        "chunks": last.data_ptr(),
        "weights": weights,
        "along": along,
        "saved": saved,
        "backup": backup.data_ptr(),
    }
    struct = array("q", [facts.get(field, 0) for field in FIELDS])
    at = struct.buffer_info()[0]
    group, partials, norm = (
        torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    _cpu.grad_norm(at, group.data_ptr(), partials.data_ptr(), 1)
    length = (4 * (size - tail.start)) ** 0.5
    assert float(partials.sum().sqrt()) == pytest.approx(length, rel=1e-12)
    _cpu.perturb(at, group.data_ptr(), partials.data_ptr(), 2, 0.0, norm.data_ptr(), None, 1)
    assert torch.equal(weight[tail], torch.full_like(weight[tail], 1.0 + 0.5 * 2.0 / length))
    _cpu.restore(at, True, 1)
    assert torch.equal(weight[tail], torch.ones_like(weight[tail]))


@pytest.mark.guarantee(id="gradient-layout")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_gradients_that_float16_does_not_hold(momentum: float, size: float) -> None:
    """The large ones were infinite and the small ones zero: neither perturbed, and the first ended in the weights."""
    p, own = make_params([100], torch.float16, grads=False)[0], make_params([100], torch.float16, grads=False)[0]
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this PyTorch ties a gradient's dtype to its parameter's")
    p.grad_dtype = own.grad_dtype = torch.float32
    options = {"lr": 0.01 / size, "momentum": momentum}
    optimizer, plain = SAM([p], rho=8.0, **options), torch.optim.SGD([own], **options)
    for step in range(3):
        before = p.detach().double()
        p.grad = size * normal(p.shape, torch.Generator().manual_seed(step))
        g = p.grad.double()
        optimizer.first_step()
        assert float(optimizer.grad_norm) == pytest.approx(float(g.norm()), rel=1e-6)
        torch.testing.assert_close(p.detach().double(), before + 8.0 * g / g.norm(), rtol=1e-3, atol=1e-3)
        p.grad = size * normal(p.shape, torch.Generator().manual_seed(step + 10))
        own.grad = p.grad.clone()
        optimizer.second_step()
        plain.step()
        torch.testing.assert_close(p, own, rtol=2e-3, atol=1e-3)


def test_flatten_refuses_gradients_of_another_dtype_by_name() -> None:
    params = make_params([5, 6], grads=False)
    if not hasattr(params[1], "grad_dtype"):
        pytest.skip("this PyTorch ties a gradient's dtype to its parameter's")
    params[1].grad_dtype = torch.float64
    addresses = [p.data_ptr() for p in params]
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 is torch.float32 with grad_dtype torch.float64"):
        SAM(params, lr=0.1, flatten=True)
    assert [p.data_ptr() for p in params] == addresses


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_may_be_frozen_and_is_refused_by_name_when_trained(dtype: torch.dtype) -> None:
    """As the weights of a quantised backbone. PyTorch's own error named no parameter, after others had moved."""
    model = nn.Linear(4, 4)
    backbone = nn.Parameter(torch.randn(4, 4).to(dtype), requires_grad=False)
    optimizer = SAM([("backbone", backbone), *model.named_parameters()], lr=0.1)

    def backward() -> None:
        (model(torch.ones(2, 4)) @ backbone.float()).square().mean().backward()

    backward()
    optimizer.first_step(zero_grad=True)
    backward()
    optimizer.second_step(zero_grad=True)
    backbone.requires_grad_(True)
    backward()
    before = values(model.parameters())
    with pytest.raises(RuntimeError, match=rf"parameter 'backbone' is {dtype}, .*perturb=False"):
        optimizer.first_step()
    assert same_bits(before, list(model.parameters()))


def test_float8_whose_gradient_cannot_be_clipped_is_named() -> None:
    """The error spoke of sparse gradients."""
    (w,), float8 = make_params([4]), nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn))
    optimizer = SAM([{"params": [w]}, {"params": [float8], "perturb": False}], lr=0.1)
    for p in (w, float8):
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    optimizer._step.clip_grad_norm = 1.0
    with pytest.raises(RuntimeError, match=r"clip_grad_norm cannot clip .* parameter 0 of group 1.* float8"):
        optimizer.second_step()
