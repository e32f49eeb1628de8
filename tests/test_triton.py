"""The triton backend: interruptions, and the same bits as the cpu backend."""

from __future__ import annotations

import pytest
import torch
from cases import (
    CHUNK,
    SIZES,
    buckets_of,
    each_dtype,
    interpreter,
    make_params,
    same_bits,
    values,
)
from torch import nn

from sam_fast import SAM, backends
from sam_fast.backends import GroupOptions
from sam_fast.backends import triton as backend
from sam_fast.backends.bucket import Bucket

TRITON = backends.BACKENDS["triton"]


def options(**changes: object) -> GroupOptions:
    return GroupOptions([{"rho": 0.05, "adaptive": False, "eta": 0.0, "perturb": True, **changes}])


def perturb(bucket: Bucket, options: GroupOptions, partials: torch.Tensor | None = None, eps: float = 1e-12) -> float:
    """grad_norm and perturb, or perturb with other partial sums than its own."""
    norm = torch.zeros((), dtype=torch.float64)
    own = torch.zeros(bucket.num_partials, dtype=torch.float64)
    _ = bucket.backup
    assert bucket.collect(options)
    bucket.grad_norm(options, own)
    bucket.perturb(options, own if partials is None else partials, eps, norm)
    return float(norm)


# ---- Bits and sizes --------------------------------------------------------------------------------------------------


@interpreter
@each_dtype
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("eps", [1e-12, 0.1], ids=str)  # 0.1 is not a float32
def test_same_bits_as_the_cpu_backend(dtype, adaptive, eps):
    if "cpu" not in backends.available():
        pytest.skip("the cpu backend was not built")
    partials = torch.tensor([0.3, 0.0, 0.7], dtype=torch.float64)
    moved, norms = [], []
    for name in ("cpu", "triton"):
        params = make_params(SIZES, dtype)
        bucket = backends.BACKENDS[name].bucket(params, [0] * len(params))
        norms.append(perturb(bucket, options(adaptive=adaptive, eta=0.01, rho=0.3), partials, eps))
        moved.append(values(params) + values(bucket.backups))
    assert norms[0] == norms[1]
    assert same_bits(*moved)
    assert not same_bits(moved[1][: len(SIZES)], values(make_params(SIZES, dtype)))


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shifts", [(0, 0), (0, 1), (1, 0), (2, 2), (0, 2), (0, 4), (4, 0), (6, 2)], ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_every_alignment_takes_the_widest_access(monkeypatch, dtype, shifts, adaptive):
    """Weights and gradients any number of elements behind an aligned address."""
    from interpreter import Unmasked, blocks_by_width

    chunks = [CHUNK, 2100]
    w, g = (torch.rand(sum(chunks) + shift, dtype=torch.float64).to(dtype)[shift:] for shift in shifts)
    w.grad = g
    bucket = TRITON.bucket([w], [0])
    _ = bucket.backup
    assert w.data_ptr() % 64 == shifts[0] * dtype.itemsize
    assert g.data_ptr() % 64 == shifts[1] * dtype.itemsize
    weights, grads = (shift * dtype.itemsize for shift in shifts)
    width = {block: wide for block, wide in ((2048, 16), (1024, 8), (256, 4)) if wide > dtype.itemsize}
    unmasked = Unmasked(monkeypatch, width)

    def expected(*moves: tuple[int, int]) -> dict[int, int]:
        """Of blocks at these addresses, each moved so many times."""
        found = dict.fromkeys(width.values(), 0)
        for address, times in moves:
            for wide, count in blocks_by_width(chunks, address, width).items():
                found[wide] += times * count
        return {wide: count for wide, count in found.items() if count}

    perturb(bucket, options(adaptive=adaptive))
    assert unmasked.found == expected((grads | (weights if adaptive else 0), 1 + adaptive), (weights | grads, 4))
    words = {4: {2048: 16, 1024: 8}, 2: {4096: 16, 2048: 8, 1024: 4}, 8: {1024: 16}}[dtype.itemsize]
    unmasked.width, width = words, words
    for call in (bucket.restore, bucket.save):
        unmasked.found.clear()
        call()
        assert unmasked.found == expected((weights, 2))


@interpreter
def test_elements_beyond_two_to_the_31():
    """The kernels walk one chunk far inside a tensor and the backup; only that part of them exists."""
    chunks = torch.tensor([[0, 0, (1 << 31) + CHUNK, CHUNK - 5, (1 << 31) + 2 * CHUNK]])
    begin, count, slot = chunks[0, 2:].tolist()
    from sam_fast.kernels import copy, grad_norm, perturb

    w, g = torch.randn(count).bfloat16(), torch.randn(count).bfloat16()
    # 4 GiB of addresses; no memory is used but the chunk's
    flat = torch.empty(2 * (slot + CHUNK), dtype=torch.uint8)
    before, backup = w.clone(), flat.view(torch.bfloat16)[slot : slot + count]
    group = options(rho=50.0).values.tobytes()
    table = torch.tensor(
        [t.data_ptr() - 2 * begin for t in (w, g)] + torch.frombuffer(bytearray(group), dtype=torch.int64).tolist()
    )
    partials, norm, written = (
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.int64),
    )
    grad_norm.grad_norm(chunks, table, 1, partials, torch.bfloat16)
    assert float(partials.sum()) == pytest.approx(float(g.double().square().sum()), rel=1e-12)
    perturb.perturb(2, chunks, table, 1, partials, 0.0, norm, flat, written, 9, None, torch.bfloat16)
    assert same_bits([backup], [before])
    assert float((w.double() - before.double()).norm()) == pytest.approx(50.0, rel=1e-2)
    copy.restore(2, chunks, table[:1], flat, written, 9, 2)
    assert same_bits([w], [before])
    backup.zero_()
    copy.backup(2, chunks, table[:1], flat, written, 10, 2)
    assert same_bits([backup], [before])


@interpreter
def test_programs_without_chunks_write_zero():
    bucket = TRITON.bucket([torch.zeros(0)], [0])
    partials = torch.full((bucket.num_partials,), float("nan"), dtype=torch.float64)
    assert bucket.collect(options())
    bucket.grad_norm(options(), partials)
    assert float(partials.sum()) == 0.0
    assert perturb(bucket, options()) == 0.0


# ---- Interruptions ---------------------------------------------------------------------------------------------------


def interrupt(monkeypatch, module: str, when: str) -> None:
    """The launch of ``module`` raises KeyboardInterrupt, before or after it is made."""
    kernels = backend._kernels(module)
    launch = getattr(kernels, f"{module}_kernel")

    class Interrupted:
        def __getitem__(self, grid):
            return self.run if when == "after" else self.fail

        def run(self, *args, **kwargs):
            launch[(1,)](*args, **kwargs)
            raise KeyboardInterrupt

        def fail(self, *args, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(kernels, f"{module}_kernel", Interrupted())


@interpreter
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [False, True], ids=["", "dtype-changes"])
def test_interrupted_first_step(monkeypatch, when, change):
    """Moved weights come back; weights that were not moved are not overwritten by a backup that was not written."""
    params = make_params([100, 20_000])
    optimizer = SAM(params, lr=0.0, backend="triton")
    before = values(params)
    optimizer.first_step()
    optimizer.second_step()
    (bucket,) = buckets_of(optimizer)
    bucket.backup.fill_(7.0)  # an old backup
    if change:  # the weights are given another dtype before the step is undone
        restore = type(bucket).restore

        def changed(self, release=True):
            for p in params:
                p.data, p.grad = p.data.double(), None
            restore(self, release)

        monkeypatch.setattr(type(bucket), "restore", changed)
    interrupt(monkeypatch, "perturb", when)
    with pytest.raises(KeyboardInterrupt):
        optimizer.first_step()
    monkeypatch.undo()
    assert not optimizer.perturbed
    assert bucket.saved() == []
    assert all(torch.equal(p, w.to(p.dtype)) for p, w in zip(params, before, strict=True))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    optimizer.second_step()
    assert all(torch.equal(p, w.to(p.dtype)) for p, w in zip(params, before, strict=True))


@interpreter
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_restore_can_be_made_again(monkeypatch, when):
    params = make_params([100, 20_000])
    optimizer = SAM(params, lr=0.0, backend="triton")
    before = values(params)
    optimizer.first_step()
    interrupt(monkeypatch, "copy", when)
    with pytest.raises(KeyboardInterrupt):
        optimizer.restore()
    assert optimizer.perturbed
    monkeypatch.undo()
    optimizer.restore()
    assert same_bits(values(params), before)


@interpreter
def test_interrupted_save_restores_nothing(monkeypatch):
    tensors = [torch.randn(100)]
    bucket = TRITON.bucket(tensors, [0])
    bucket.backup.fill_(7.0)
    interrupt(monkeypatch, "copy", "before")
    with pytest.raises(KeyboardInterrupt):
        bucket.save()
    monkeypatch.undo()
    before = values(tensors)
    bucket.restore()
    assert same_bits(values(tensors), before)


@interpreter
def test_used_first_in_inference_mode():
    params = [nn.Parameter(torch.randn(100)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    bucket = TRITON.bucket(params, [0, 0])
    before = values(params)
    with torch.inference_mode():
        bucket.save()
    for p in params:
        p.data.zero_()
    bucket.restore()
    assert same_bits(values(params), before)
