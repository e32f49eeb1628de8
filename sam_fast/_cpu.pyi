"""Types of the native module, see csrc/cpu/bindings.cpp. Addresses are plain integers."""

from array import array
from typing import Any

from torch import Tensor

compiler: str
openmp: bool
sanitizer: str

class Gather:
    def __init__(self, exchange: Any, tensor_class: type[Tensor], rows: list[Tensor]) -> None: ...
    def weights(self, addresses: array[int]) -> list[int]: ...
    def grads(self, addresses: array[int]) -> list[int]: ...

def isa() -> str: ...
def use_isa(isa: str) -> None: ...
def grad_norm(
    dtype: int, chunk_table: int, num_chunks: int, weights: int, grads: int, groups: int, partials: int, threads: int, /
) -> None: ...
def perturb(
    dtype: int,
    chunk_table: int,
    num_chunks: int,
    weights: int,
    grads: int,
    saved: int,
    groups: int,
    partials: int,
    num_partials: int,
    eps: float,
    norm: int,
    flat: int,
    rounding_key: int | None,
    threads: int,
    /,
) -> int: ...
def backup(
    itemsize: int, chunk_table: int, num_chunks: int, rows: int, saved: int, flat: int, threads: int, /
) -> None: ...
def restore(
    itemsize: int,
    chunk_table: int,
    num_chunks: int,
    rows: int,
    saved: int,
    flat: int,
    release_saved: bool,
    threads: int,
    /,
) -> None: ...
def restore_sgd(
    dtype: int,
    chunk_table: int,
    num_chunks: int,
    num_rows: int,
    weights: int,
    grads: int,
    saved: int,
    flat: int,
    grad_scale: float,
    rounding_key: int | None,
    groups: int,
    momentum_buffers: int,
    threads: int,
    /,
) -> int: ...
def restore_adam(
    dtype: int,
    chunk_table: int,
    num_chunks: int,
    num_rows: int,
    weights: int,
    grads: int,
    saved: int,
    flat: int,
    grad_scale: float,
    rounding_key: int | None,
    groups: int,
    steps: int,
    exp_avgs: int,
    exp_avg_sqs: int,
    max_exp_avg_sqs: int,
    threads: int,
    /,
) -> int: ...
