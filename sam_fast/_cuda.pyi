"""Types of the native module, see csrc/cuda/bindings.cpp. Addresses are plain integers."""

compiler: str
architectures: str
device_type: str
steps: dict[str, tuple[int, tuple[str, ...], tuple[str, ...], bool]]
"""As in ``_cpu``."""

def probe(device: int, /) -> None: ...
def grad_norm_blocks(device: int, bucket: int, /) -> int: ...
def grad_norm(device: int, stream: int, bucket: int, options: int, partials: int, num_partials: int, /) -> None: ...
def perturb(
    device: int,
    stream: int,
    bucket: int,
    options: int,
    partials: int,
    num_partials: int,
    eps: float,
    norm: int,
    reverse: bool,
    rounding_key: int | None,
    /,
) -> int: ...
def backup(device: int, stream: int, bucket: int, /) -> None: ...
def restore(device: int, stream: int, bucket: int, release: bool, /) -> None: ...
def step(
    index: int,
    device: int,
    stream: int,
    bucket: int,
    options: int,
    grad_scale: int,
    found_inf: int,
    learning_rates: int,
    device_counters: bool,
    rounding_key: int | None,
    /,
) -> int: ...
def use_large_arguments(use: bool) -> None: ...
