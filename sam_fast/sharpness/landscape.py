"""The loss along directions, and in planes, through the weights (Li et al., https://arxiv.org/abs/1712.09913)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..norm_layers import is_norm_layer
from ..storage import is_dtensor
from .measurement import Measurement, finite, generator, trainable

Direction = Mapping[str, Tensor]
"""Name of a parameter, as in ``named_parameters()`` -> a tensor of its shape. Parameters that are not in it stay."""


@dataclass(frozen=True)
class Line:
    """``losses[i]`` is the mean loss at ``w + steps[i] * direction``; far away it may be inf or NaN."""

    steps: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Plane:
    """``losses[i][j]`` is the mean loss at ``w + steps[i] * first + other_steps[j] * second``."""

    steps: tuple[float, ...]
    other_steps: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]


def filter_normalized(model: nn.Module, direction: Direction) -> dict[str, Tensor]:
    """``direction`` with each filter scaled to the norm of the model's own, so that models whose weights differ in size
    can be compared; without biases and the parameters of normalization layers.

    A filter is a slice along the first dimension of a parameter with at least two: an output channel of a convolution,
    an output of a linear layer.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``direction`` does not fit the model, or its parameters are DTensors.
    """
    params = trainable(model)
    norms = {p for module in model.modules() if is_norm_layer(module) for p in module.parameters(recurse=False)}
    if any(map(is_dtensor, params.values())):
        raise ValueError("model's parameters are spread over processes, and filters have to be whole")
    normalized = {}
    with torch.no_grad():
        for name, along in _checked(params, direction, "direction").items():
            if along.dim() >= 2 and params[name] not in norms:
                own, drawn = _filter_norms(params[name]), _filter_norms(along)
                normalized[name] = along * torch.where(drawn == 0, drawn, own / drawn).to(along.dtype)
    return normalized


def _filter_norms(tensor: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), keepdim=True, dtype=wide)
    return norms


def random_direction(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A Gaussian direction, :func:`filter_normalized`. The same seed draws the same numbers for models of the same
    shapes, on every device; the global random state is not touched.

    Raises:
        TypeError, ValueError: as :func:`filter_normalized`.
    """
    draws = generator("cpu", seed)
    drawn = {
        name: torch.randn(p.shape, generator=draws, dtype=torch.cfloat if p.is_complex() else None, device="cpu")
        for name, p in trainable(model).items()
    }
    return filter_normalized(model, drawn)


def loss_along(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    direction: Direction,
    steps: Sequence[float],
    *,
    backend: str | None = None,
    progress: bool = False,
) -> Line:
    """The mean loss at ``w + step * direction`` for each of ``steps``: one forward pass each, over batches that are
    gone through once.

    All steps draw the same dropout masks; for the rest see :func:`sam_fast.sharpness.rho_sharpness`. With
    DistributedDataParallel each process passes batches of its own.

    ``model``, ``loss_fn``, ``batches``, ``backend`` and ``progress`` are as in
    :func:`sam_fast.sharpness.rho_sharpness`.

    Args:
        direction: :func:`random_direction`, or any other, such as the difference to another model's weights.
        steps: such as ``torch.linspace(-1, 1, 21).tolist()``. With a filter-normalized direction 1 moves each filter by
            its own norm.

    Raises:
        TypeError: an argument is of the wrong type, or ``loss_fn`` returns no tensor.
        ValueError: ``direction`` does not fit the model, is zero or not finite; ``steps`` or ``batches`` is empty; the
            loss is no scalar, or not finite at w; the model has no trainable parameters or is sharded (FSDP2).
    """
    measured = Measurement(model, loss_fn, batches, "loss_along()", backend)
    points = [(step,) for step in _numbers("steps", steps)]
    losses = _losses(measured, [_aligned(measured, direction, "direction")], points, progress)
    return Line(tuple(step for (step,) in points), tuple(losses))


def landscape(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    first: Direction,
    second: Direction,
    steps: Sequence[float],
    other_steps: Sequence[float] | None = None,
    *,
    backend: str | None = None,
    progress: bool = False,
) -> Plane:
    """The mean loss at ``w + step * first + other_step * second``: one forward pass for each pair.

    ``model``, ``loss_fn``, ``batches``, ``backend`` and ``progress`` are as in
    :func:`sam_fast.sharpness.rho_sharpness`.

    Args:
        first, second: two directions, such as ``random_direction(model, 0)`` and ``random_direction(model, 1)``.
        steps, other_steps: along the first and the second; by default the same.

    Raises:
        TypeError, ValueError: as :func:`loss_along`.
    """
    measured = Measurement(model, loss_fn, batches, "landscape()", backend)
    rows = _numbers("steps", steps)
    columns = rows if other_steps is None else _numbers("other_steps", other_steps)
    directions = [_aligned(measured, first, "first"), _aligned(measured, second, "second")]
    losses = _losses(measured, directions, list(product(rows, columns)), progress)
    width = len(columns)
    return Plane(rows, columns, tuple(tuple(losses[i : i + width]) for i in range(0, len(losses), width)))


def _losses(
    measured: Measurement,
    directions: Sequence[Sequence[Tensor | None]],
    points: Sequence[tuple[float, ...]],
    progress: bool,
) -> list[float]:
    """The mean loss at each point, which says how far to go along each direction."""
    sums, total = [0.0] * len(points), 0
    all_ticks = None if measured.count is None else measured.count * len(points)
    with measured.leaving_no_trace(), measured.progress(progress, "landscape", all_ticks) as tick, torch.no_grad():
        for batch, rows in measured.each_batch():
            state = measured.random_state()
            for index, steps in enumerate(points):
                state.apply()
                if any(steps):
                    along = _combined(directions, steps)
                    with measured.moved(along, _norm(along), eps=0.0):
                        value = float(measured.loss(batch))
                else:
                    value = finite(measured.loss(batch), "w")
                sums[index] += rows * value
                tick()
            total += rows
    means: list[float] = measured.means(sums, total).tolist()
    return means


def _combined(directions: Sequence[Sequence[Tensor | None]], steps: Sequence[float]) -> list[Tensor | None]:
    """The sum of ``steps[i] * directions[i]``."""
    combined: list[Tensor | None] = []
    for of_param in zip(*directions, strict=True):
        terms = [step * along for step, along in zip(steps, of_param, strict=True) if along is not None]
        combined.append(sum(terms[1:], terms[0]) if terms else None)
    return combined


def _norm(direction: Sequence[Tensor | None]) -> float:
    wide = [along.to(torch.promote_types(along.dtype, torch.float32)) for along in direction if along is not None]
    return math.hypot(*(float(torch.linalg.vector_norm(along)) for along in wide))


def _numbers(name: str, steps: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, () if isinstance(steps, str) else steps))
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be numbers such as [-1.0, 0.0, 1.0], got {steps!r}") from None
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be finite numbers, at least one, got {steps!r}")
    return numbers


def _aligned(measured: Measurement, direction: Direction, argument: str) -> list[Tensor | None]:
    """For each parameter its part of the direction, on its device and in its dtype."""
    params = measured.params_by_name
    checked = _checked(params, direction, argument)
    norm = _norm(list(checked.values()))
    if not (math.isfinite(norm) and norm > 0.0):
        raise ValueError(f"{argument} has norm {norm}: it leads nowhere")
    return [checked.get(name) for name in params]


def _checked(params: Mapping[str, Tensor], direction: Direction, argument: str) -> dict[str, Tensor]:
    if not isinstance(direction, Mapping):
        raise TypeError(f"{argument} must map names of parameters to tensors, got {type(direction).__name__}")
    checked = {}
    for name, along in direction.items():
        if name not in params:
            raise ValueError(f"{argument} has {name!r}, which is not a trainable parameter of model")
        p = params[name]
        if not isinstance(along, Tensor):
            raise TypeError(f"{argument}[{name!r}] must be a tensor, got {type(along).__name__}")
        if along.shape != p.shape:
            raise ValueError(f"{argument}[{name!r}] has shape {tuple(along.shape)}, the parameter {tuple(p.shape)}")
        checked[name] = along.detach().to(p.device, p.dtype)
    return checked
