"""How wide the CUDA kernels' accesses to memory are, counted by the emulation: the widest that the addresses allow."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import buckets_of

from sam_fast import SAM, backends

if "cuda_emulation.plugin" not in sys.modules:
    pytest.skip("needs the emulated CUDA module (make test-cuda)", allow_module_level=True)

from cuda_emulation.plugin import PATH

pytestmark = pytest.mark.stand_in
_library = ctypes.CDLL(PATH)
counts_accesses = ctypes.c_int64.in_dll(_library, "sam_emulation_counts_accesses")
loads = (ctypes.c_int64 * 5).in_dll(_library, "sam_emulation_loads")
stores = (ctypes.c_int64 * 5).in_dll(_library, "sam_emulation_stores")
TILE_BYTES = 16384


@pytest.fixture(autouse=True)
def _no_count_left() -> Iterator[None]:
    yield
    counts_accesses.value = 0


def units(nbytes: int, alignment: int, itemsize: int) -> dict[int, int]:
    """Accesses by width that move ``nbytes`` at an address that is a multiple of ``alignment``: the widest as often as
    they fit, then elements.
    """
    width = max(alignment, itemsize)
    if itemsize == 8 and nbytes % 16:
        width = 8
    found = {width: nbytes // width}
    if nbytes % width:
        found[itemsize] = found.get(itemsize, 0) + nbytes % width // itemsize
    return found


def total(parts: list[dict[int, int]]) -> dict[int, int]:
    return {
        width: sum(part.get(width, 0) for part in parts)
        for width in sorted({width for part in parts for width in part})
    }


def moved(call) -> tuple[dict[int, int], dict[int, int]]:
    """The loads and stores of a call, by width in bytes."""
    loads[:] = stores[:] = [0] * 5
    counts_accesses.value = 1
    call()
    counts_accesses.value = 0
    return tuple({1 << i: n for i, n in enumerate(found) if n} for found in (loads, stores))  # type: ignore[return-value]


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


@dtypes
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("behind", [(0, 0), (0, 2), (0, 4), (0, 8), (4, 8), (8, 0), (2, 6)], ids=str)
def test_every_alignment_takes_the_widest_access(dtype, behind, adaptive):
    """A tensor of one whole tile and a part of one; weights and gradients so many bytes behind an aligned address."""
    itemsize = dtype.itemsize
    if any(shift % itemsize for shift in behind):
        pytest.skip("no element lies there")
    size = TILE_BYTES // itemsize + 1005
    w, g = (torch.ones(size + shift // itemsize, dtype=dtype)[shift // itemsize :] for shift in behind)
    assert (w.data_ptr() % 64, g.data_ptr() % 64) == behind
    p = torch.nn.Parameter(w)
    assert p.data_ptr() == w.data_ptr()
    p.grad = g
    optimizer = SAM([p], lr=0.1, adaptive=adaptive, backend="cuda")
    optimizer.first_step()
    optimizer.restore()
    (bucket,) = buckets_of(optimizer)
    options = backends.GroupOptions(optimizer.param_groups)
    partials, norm = torch.zeros(bucket.num_partials, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    assert bucket.collect(options)

    def alignment(*shifts: int) -> int:
        return min(16, *(shift & -shift or 16 for shift in shifts))

    tiles = (TILE_BYTES, 1005 * itemsize)
    of_norm = total(
        [units(tile, alignment(*behind) if adaptive else alignment(behind[1]), itemsize) for tile in tiles]
        * (1 + adaptive)
    )
    assert moved(lambda: bucket.grad_norm(options, partials)) == (of_norm, {})
    of_perturb = total([units(tile, alignment(*behind), itemsize) for tile in tiles] * 2)
    assert moved(lambda: bucket.perturb(options, partials, 0.0, norm)) == (of_perturb, of_perturb)
    of_copy = total(
        [
            units(size * itemsize // TILE_BYTES * TILE_BYTES, alignment(behind[0]), 1),
            units(tiles[1], alignment(behind[0]), 1),
        ]
    )
    assert moved(lambda: bucket.restore()) == (of_copy, of_copy)


@dtypes
@pytest.mark.parametrize("shift", [0, 2, 4, 8])
@pytest.mark.parametrize(
    ("base", "options"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})], ids=["sgd", "adamw"]
)
def test_every_alignment_takes_the_widest_access_in_the_second_step(base, options, dtype, shift):
    itemsize = dtype.itemsize
    if shift % itemsize:
        pytest.skip("no element lies there")
    size = TILE_BYTES // itemsize + 1005
    p = torch.nn.Parameter(torch.ones(size, dtype=dtype))
    p.grad = torch.ones(size + shift // itemsize, dtype=dtype)[shift // itemsize :]
    optimizer = SAM([p], base, lr=0.1, backend="cuda", **options)
    optimizer.first_step()
    optimizer.second_step()
    optimizer.first_step()
    arrays = (3, 2) if base is torch.optim.SGD else (4, 3)
    parts = [units(tile, shift or 16, itemsize) for tile in (TILE_BYTES, 1005 * itemsize)]
    assert moved(optimizer.second_step) == tuple(total(parts * times) for times in arrays)
