"""Cases, tolerances and oracles that several test files use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_fast import SAM, backends
from sam_fast.backends import Bucket
from sam_fast.backends.bucket import CHUNK
from sam_fast.backends.memory import is_dense

RESTRICTED = os.environ.get("SAM_FAST_TEST_BACKENDS", "")
"""Names of backends, comma-separated: only they are tested, and only by tests that take each backend in turn.

Empty: all that can be used here.
"""

BACKENDS = [name for name in backends.available() if not RESTRICTED or name in RESTRICTED.split(",")]

INTERPRETED = backends.triton.INTERPRETED
"""Whether Triton kernels run in its interpreter: a thousand times slower than a GPU."""


def interpreter(test: Any) -> Any:
    """Marks a test that runs Triton's kernels in its interpreter, as `make test-triton` does."""
    return pytest.mark.stand_in(
        pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: make test-triton")(test)
    )


EMULATED = backends.cuda._cuda is not None and backends.cuda._cuda.device_type == "cpu"
"""Whether the CUDA kernels are executed on the CPU (tests/cuda_emulation)."""


def device_of(backend: str) -> str:
    """Where the tests of a backend put their tensors."""
    on_gpu = (backend == "cuda" and not EMULATED) or (backend == "triton" and not INTERPRETED)
    return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

SIZES = [
    0,
    1,
    2,
    3,
    7,
    15,
    16,
    17,
    31,
    63,
    64,
    65,
    127,
    1009,
    4099,
    CHUNK - 1,
    CHUNK,
    CHUNK + 1,
    2 * CHUNK + 17,
    100_003,
]
"""Around one vector, one 64-byte line, one chunk, and odd primes."""

EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
"""The distance from 1 to the next number: a correctly rounded result is within half of that, relative."""


def norm_tolerance(backend: str, dtype: torch.dtype = torch.float32) -> float:
    """The relative error that a backend's norm may have.

    cpu and triton square and add in float64: products of float32 numbers are exact there, and what is left is the error
    of the sums. cuda adds 32 squares at a time in float32: six roundings of half an epsilon in the square, half of that
    in the norm. torch multiplies |w| g in the tensors' own dtype (float32 for the 16-bit ones).
    """
    if backend == "torch":
        return 1e-7
    if backend == "cuda" and dtype != torch.float64:
        return 6 * 0.5 * EPSILON[torch.float32] * 0.5
    return 1e-12


def is_dense_of_a_stand_in(tensor: Any) -> bool:
    """``is_dense`` for what only has a tensor's shape and strides."""
    return is_dense(torch.empty_strided(tensor.shape, tensor.stride(), device="meta"))


def buckets_of(optimizer: SAM) -> list[Bucket]:
    """Its buckets, for tests of what a bucket does inside a whole step, and of what that costs."""
    return optimizer._perturbation.buckets


def flattened(optimizer: SAM) -> bool:
    """Whether it was made with ``flatten=True``, also while parameters have left their flat buffer."""
    return optimizer._perturbation.flatten


def make_params(
    sizes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0, grads: bool = True
) -> list[nn.Parameter]:
    """Parameters with normal values of sd 0.5, and gradients of sd 0.01, on the default device."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for size in sizes:
        p = nn.Parameter((normal(size, generator, torch.float64) * 0.5).to(dtype))
        if grads:
            p.grad = (normal(size, generator, torch.float64) * 0.01).to(dtype)
        params.append(p)
    return params


def on_gpu(sizes: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    """``make_params`` on a GPU, whatever the default device."""
    params = []
    for p in make_params(sizes, dtype, seed):
        q = nn.Parameter(p.detach().cuda())
        assert p.grad is not None
        q.grad = p.grad.cuda()
        params.append(q)
    return params


def normal(size: int | Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values on the default device, the same on every device."""
    return torch.randn(size, generator=generator, dtype=dtype, device="cpu").to(torch.get_default_device())


def values(params: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the values, to compare with later."""
    return [p.detach().clone() for p in params]


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """True if all tensors have the same shapes, dtypes and bits; NaN equals itself, 0.0 does not equal -0.0."""
    return len(a) == len(b) and all(
        x.shape == y.shape
        and x.dtype == y.dtype
        and torch.equal(
            x.detach().contiguous().flatten().view(torch.uint8), y.detach().contiguous().flatten().view(torch.uint8)
        )
        for x, y in zip(a, b, strict=True)
    )


def same_step(base: type[torch.optim.Optimizer], a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """True if the weights are those of ``base``'s own step: the same bits, but for Adam and AdamW.

    There the fused second step takes correctly rounded square roots; PyTorch takes MKL's, of which one in six is a unit
    in the last place off.
    """
    if base in (torch.optim.Adam, torch.optim.AdamW):
        return all(torch.allclose(x, y, rtol=1e-6, atol=1e-8) for x, y in zip(a, b, strict=True))
    return same_bits(a, b)


class SmallNet(nn.Module):
    """A convolutional network with BatchNorm, with layers for two groups: small, but with everything that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            # a bias before BatchNorm has a gradient of nothing but rounding errors
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 11, 3, bias=False),
            nn.BatchNorm2d(11),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(11 * 4, 13), nn.ReLU(), nn.Linear(13, 10))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


def batches(steps: int, batch: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of 1x8x8 images and labels for :class:`SmallNet`, on the default device."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        images = normal((batch, 1, 8, 8), generator)
        labels = torch.randint(0, 10, (batch,), generator=generator, device="cpu")
        found.append((images, labels.to(images.device)))
    return found


def give(params: Sequence[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    """Normal gradients, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (normal(p.shape, generator) * scale).to(p.dtype)


def train(model: nn.Module, optimizer: SAM, data: Sequence[tuple[Tensor, Tensor]]) -> None:
    """The loop of the guide."""
    for x, y in data:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)


def give_doubles(params: list[nn.Parameter], seed: int) -> None:
    """Gradients that are drawn in float64, whatever the dtype."""
    for p, g in zip(params, make_params([p.numel() for p in params], torch.float64, seed), strict=True):
        p.grad = g.detach().reshape(p.shape).to(p.dtype)


def two_passes(optimizer: Any, params: list[nn.Parameter], seed: int) -> None:
    """A step, each of its passes with gradients of its own."""
    give_doubles(params, 2 * seed)
    optimizer.first_step()
    give_doubles(params, 2 * seed + 1)
    optimizer.second_step()


def wrap(optimizer: torch.optim.Optimizer) -> Any:
    """As Lightning and Fabric do: an object of a subclass with its own attributes that falls back on the
    optimizer's.
    """

    class Wrapper:
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self._optimizer = inner
            self.__class__ = type("Wrapped" + type(inner).__name__, (self.__class__, type(inner)), {})

        def step(self, closure: Any = None, **options: Any) -> Any:
            return self._optimizer.step(closure, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._optimizer, name)

    return Wrapper(optimizer)
