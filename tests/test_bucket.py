"""Buckets: slots, chunks, layouts; and the norm over several buckets and devices."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from cases import DTYPES, SIZES, buckets_of, make_params

from sam_fast import SAM, backends
from sam_fast.amp import Scaling
from sam_fast.backends.bucket import CHUNK, Bucket
from sam_fast.backends.memory import ALIGNMENT, is_dense
from sam_fast.norm import NormSum, exchange_sums


def bucket_of(tensors, groups=None) -> Bucket:
    return backends.BACKENDS["torch"].bucket(tensors, groups or [0] * len(tensors))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.complex128], ids=lambda d: str(d).removeprefix("torch."))
def test_every_slot_starts_on_a_cache_line_and_slots_do_not_overlap(dtype):
    tensors = [torch.zeros(n, dtype=dtype) for n in SIZES]
    bucket = bucket_of(tensors)
    ends = [0]
    for tensor, slot in zip(tensors, bucket.slots, strict=True):
        assert slot * dtype.itemsize % ALIGNMENT == 0
        assert slot >= ends[-1]
        ends.append(slot + tensor.numel())
    assert bucket.numel >= ends[-1]
    assert bucket.backup.data_ptr() % ALIGNMENT == 0


def test_chunks_cover_every_element_once():
    tensors = [torch.zeros(n) for n in SIZES]
    groups = [i % 2 for i in range(len(SIZES))]
    bucket = bucket_of(tensors, sorted(groups))
    covered = [torch.zeros(n, dtype=torch.int32) for n in SIZES]
    last_slot = -1
    for index, group, begin, count, slot in bucket.chunks.tolist():
        assert 0 < count <= CHUNK
        assert group == bucket.groups[index]
        assert slot == bucket.slots[index] + begin
        assert slot > last_slot
        last_slot = slot
        covered[index][begin : begin + count] += 1
    assert all(bool((c == 1).all()) for c in covered)


def test_chunk_size_keeps_slots_aligned():
    assert CHUNK % ALIGNMENT == 0


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.zeros(4, 5), True),
        (torch.zeros(4, 5).t(), True),
        (torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True),
        (torch.zeros(2, 3, 4).permute(1, 2, 0), True),
        (torch.zeros(()), True),
        (torch.zeros(0, 3), True),
        (torch.zeros(3, 1, 2).as_strided((3, 1, 2), (2, 77, 1)), True),
        (torch.zeros(8)[::2], False),
        (torch.zeros(4, 5)[:, :3], False),
        (torch.zeros(1).expand(7), False),
        (torch.zeros(10).as_strided((3, 3), (1, 1)), False),
    ],
    ids=lambda v: "x".join(map(str, v.shape)) if isinstance(v, torch.Tensor) else "",
)
def test_dense_means_without_gaps_or_overlaps(tensor, dense):
    assert is_dense(tensor) is dense


@pytest.mark.guarantee(id="one-norm")
def test_mixed_dtypes_and_layouts_share_one_norm():
    params = [p for i, dtype in enumerate(DTYPES) for p in make_params([100, 40_000], dtype, seed=i)]
    strided = torch.nn.Parameter(torch.randn(60)[::2])
    strided.grad = torch.randn(30) * 0.01
    params.append(strided)
    optimizer = SAM(params, lr=0.1)
    assert len(buckets_of(optimizer)) == 5
    optimizer.first_step()
    exact = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
    assert float(optimizer.grad_norm) == pytest.approx(exact, rel=1e-6)


@pytest.mark.guarantee(id="one-norm")
def test_sums_are_exchanged_between_devices():
    """Three stand-ins for devices: each must end with its own partial sums and the others' totals."""
    sums = [NormSum(torch.device("cpu"), own, 2) for own in (3, 1, 2)]
    for i, s in enumerate(sums):
        s.partials[: s.own] = torch.arange(1.0, s.own + 1.0, dtype=torch.float64) * 10**i
    total = sum(float(s.own_sum()) for s in sums)
    exchange_sums(sums)
    for s in sums:
        assert float(s.partials.sum()) == total


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_host_waits_for_what_it_reads(kind):
    """A clipped step of parameters on a GPU and on the host read its factor there before it had arrived."""
    device, asked = torch.device(kind), []

    class Asked:
        """As much of a tensor as is used."""

        def __init__(self) -> None:
            self.device = device

        def __getitem__(self, _):
            return self

        def to(self, _, non_blocking):
            asked.append(non_blocking)

        copy_ = to

    Scaling(Asked(), None).on(device)
    exchange_sums([SimpleNamespace(own=1, partials=Asked(), own_sum=lambda: None) for _ in range(2)])
    assert asked == [kind == "cuda"] * 3


def test_ten_thousand_parameters():
    params = make_params([1 + i % 5 for i in range(10_000)])
    before = [p.detach().clone() for p in params]
    optimizer = SAM(params, lr=0.0, rho=0.1)
    optimizer.first_step()
    moved = math.sqrt(sum(float((p.detach() - b).double().square().sum()) for p, b in zip(params, before, strict=True)))
    assert moved == pytest.approx(0.1, rel=1e-4)
    optimizer.second_step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.guarantee(id="no-allocation")
def test_no_allocation_after_the_first_step():
    """The backup and all tables are the same memory in every step."""
    params = make_params([1000, 20_000])
    optimizer = SAM(params, lr=0.1)

    def addresses():
        (bucket,) = buckets_of(optimizer)
        return [id(bucket), bucket.backup.data_ptr(), bucket.chunks.data_ptr()]

    optimizer.first_step()
    first = addresses()
    optimizer.second_step()
    for _ in range(3):
        optimizer.first_step()
        optimizer.second_step()
        assert addresses() == first
