"""save and restore: tensors to and from the backup, bit for bit, for any dtype, layout and address."""

from __future__ import annotations

import pytest
import torch
from cases import INTERPRETED, SIZES, same_bits
from conftest import Step

ANY_DTYPE = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.bool,
    torch.complex64,
]


def random_tensors(dtype: torch.dtype, sizes=SIZES) -> list[torch.Tensor]:
    if dtype == torch.bool:
        return [torch.randint(0, 2, (n,)).bool() for n in sizes]
    # Random bits: NaN payloads and all.
    return [torch.randint(-128, 128, (n * dtype.itemsize,), dtype=torch.int8).view(dtype) for n in sizes]


def scramble(tensors) -> None:
    for tensor in tensors:
        tensor.copy_(torch.zeros_like(tensor))


@pytest.mark.guarantee(id="restore")
@pytest.mark.parametrize("dtype", ANY_DTYPE, ids=lambda d: str(d).removeprefix("torch."))
def test_round_trip(kernels, dtype):
    tensors = random_tensors(dtype)
    before = [tensor.clone() for tensor in tensors]
    s = Step(kernels, tensors)
    assert s.bucket.save()
    scramble(tensors)
    s.bucket.restore()
    assert same_bits(tensors, before)


def test_restore_without_release_can_be_repeated(kernels):
    tensors = random_tensors(torch.float32)
    before = [tensor.clone() for tensor in tensors]
    s = Step(kernels, tensors)
    s.bucket.save()
    for _ in range(3):
        scramble(tensors)
        s.bucket.restore(release=False)
        assert same_bits(tensors, before)
    s.bucket.restore()
    scramble(tensors)
    s.bucket.restore()
    assert not any(bool(tensor.any()) for tensor in tensors)


def test_large_tensors_at_odd_addresses(kernels):
    third = 100_000 if INTERPRETED else 1_000_000
    base = torch.randn(3 * third)
    tensors = [base[1 : third + 2], base[third + 3 : -1]]
    before = base.clone()
    s = Step(kernels, tensors)
    s.bucket.save()
    scramble(tensors)
    s.bucket.restore()
    assert same_bits([base], [before])


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "permuted", "0-dim"])
def test_dense_layouts_are_walked_as_they_lie(kernels, layout):
    tensor = {
        "channels_last": lambda: torch.randn(4, 5, 6, 7).contiguous(memory_format=torch.channels_last),
        "transposed": lambda: torch.randn(50, 40).t(),
        "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
        "0-dim": lambda: torch.randn(()),
    }[layout]()
    before = tensor.clone()
    s = Step(kernels, [tensor])
    s.bucket.save()
    assert s.bucket.backups[0].stride() == tensor.stride()
    tensor.zero_()
    s.bucket.restore()
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("widened", [False, True], ids=["address", "dtype"])
def test_restore_follows_a_tensor_to_another_address_or_dtype(kernels, widened):
    p = torch.nn.Parameter(torch.randn(1000))
    before = p.detach().clone()
    s = Step(kernels, [p])
    s.bucket.save()
    p.data = torch.zeros(1000, dtype=torch.float64 if widened else torch.float32)
    s.bucket.restore()
    assert torch.equal(p, before.to(p.dtype))


def test_restore_refuses_a_tensor_of_another_shape_and_restores_the_others(kernels):
    p, q = torch.nn.Parameter(torch.randn(1000)), torch.nn.Parameter(torch.randn(70))
    before = q.detach().clone()
    s = Step(kernels, [p, q])
    s.bucket.save()
    p.data = torch.zeros(999)
    q.data.zero_()
    with pytest.raises(RuntimeError, match="shape"):
        s.bucket.restore()
    assert torch.equal(q, before)
    assert not p.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.double(),
        lambda p: p.data[:-1].clone(),
        lambda p: p.data.view(10, 100),
        lambda p: p.data.view(10, 100).t(),
    ],
    ids=["dtype", "size", "shape", "strides"],
)
def test_collect_notices_a_changed_tensor(kernels, change):
    p = torch.nn.Parameter(torch.randn(1000))
    s = Step(kernels, [p])
    p.data = change(p)
    assert not s.bucket.collect(s.options)
