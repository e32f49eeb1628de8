"""Types of the native module, see csrc/cuda/bindings.cpp. Addresses are plain integers."""

compiler: str
architectures: str
device_type: str

def probe(device: int, /) -> None: ...
def grad_norm_blocks(device: int, dtype: int, rows: int, num_rows: int, /) -> int: ...
def grad_norm(
    device: int,
    stream: int,
    dtype: int,
    rows: int,
    num_rows: int,
    weights: int,
    grads: int,
    groups: int,
    partials: int,
    num_partials: int,
    /,
) -> None: ...
def perturb(
    device: int,
    stream: int,
    dtype: int,
    rows: int,
    num_rows: int,
    weights: int,
    grads: int,
    saved: int,
    groups: int,
    partials: int,
    num_partials: int,
    eps: float,
    norm: int,
    flat: int,
    reverse: bool,
    rounding_key: int | None,
    /,
) -> int: ...
def backup(
    device: int, stream: int, itemsize: int, rows: int, num_rows: int, weights: int, saved: int, flat: int, /
) -> None: ...
def restore(
    device: int,
    stream: int,
    itemsize: int,
    rows: int,
    num_rows: int,
    weights: int,
    saved: int,
    flat: int,
    release_saved: bool,
    /,
) -> None: ...
def restore_sgd(
    device: int,
    stream: int,
    dtype: int,
    rows: int,
    num_rows: int,
    weights: int,
    grads: int,
    saved: int,
    flat: int,
    grad_scale: int,
    found_inf: int,
    learning_rates: int,
    rounding_key: int | None,
    groups: int,
    momentum_buffers: int,
    /,
) -> int: ...
def restore_adam(
    device: int,
    stream: int,
    dtype: int,
    rows: int,
    num_rows: int,
    weights: int,
    grads: int,
    saved: int,
    flat: int,
    grad_scale: int,
    found_inf: int,
    learning_rates: int,
    rounding_key: int | None,
    groups: int,
    device_steps: bool,
    steps: int,
    exp_avgs: int,
    exp_avg_sqs: int,
    max_exp_avg_sqs: int,
    /,
) -> int: ...
def use_large_arguments(use: bool) -> None: ...
