"""Types of the native module, see csrc/cpu/bindings.cpp. Addresses are plain integers."""

from array import array
from typing import Any

from torch import Tensor

compiler: str
openmp: bool
sanitizer: str
steps: dict[str, tuple[int, tuple[str, ...], tuple[str, ...], bool]]
"""The fused steps of csrc/steps.h: index, names of the options, names of the states, whether it counts steps."""
bucket_fields: tuple[str, ...]
"""The members of ``struct Bucket`` (csrc/table.h), whose address is ``bucket`` below."""

class Gather:
    def __init__(
        self, exchange: Any, tensor_class: type[Tensor], tensors: list[Tensor], params: list[Tensor], groups: list[int]
    ) -> None: ...
    def weights(self, addresses: array[int]) -> list[int]: ...
    def collect(
        self, weights: array[int], grads: array[int], wanted: bytes | None = None
    ) -> tuple[list[int], list[int]]: ...
    def read(self, tensors: list[Tensor | None], addresses: array[int]) -> list[int]: ...
    def states(
        self, state: Any, names: tuple[str, ...], masks: array[int], columns: tuple[array[int], ...]
    ) -> tuple[bool, int, int] | None: ...
    def counters(
        self, state: Any, name: str, bit: int, masks: array[int], addresses: array[int]
    ) -> tuple[tuple[bool, int, int] | None, list[Tensor], int]: ...
    @property
    def moved(self) -> bool: ...
    @property
    def num_grads(self) -> int: ...
    @property
    def has_grad(self) -> bytes: ...

def same_objects(a: list[Any], b: list[Any]) -> bool: ...
def isa() -> str: ...
def use_isa(isa: str) -> None: ...
def grad_norm(bucket: int, options: int, partials: int, threads: int, /) -> None: ...
def perturb(
    bucket: int,
    options: int,
    partials: int,
    num_partials: int,
    eps: float,
    norm: int,
    rounding_key: int | None,
    threads: int,
    /,
) -> int: ...
def backup(bucket: int, threads: int, /) -> None: ...
def restore(bucket: int, release: bool, threads: int, /) -> None: ...
def step(
    index: int, bucket: int, options: int, grad_scale: float, rounding_key: int | None, threads: int, /
) -> int: ...
