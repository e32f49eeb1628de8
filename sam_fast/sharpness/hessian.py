"""The Hessian of the mean loss over all batches, by products with vectors: its largest eigenvalue and its trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..options import check_above_zero, check_count
from .measurement import Measurement, generator, not_empty


@dataclass(frozen=True)
class Eigenvalue:
    """What :func:`hessian_eigenvalue` returns.

    Attributes:
        value: Rayleigh quotient v'Hv of the last unit vector v.
        error_bound: ``||Hv - value v||``: an eigenvalue of H lies within this distance of ``value``.
        iterations: products with the Hessian that were made.
        converged: whether ``error_bound`` is at most ``tolerance * |value|``, and this is not the smallest eigenvalue.
    """

    value: float
    error_bound: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Trace:
    """What :func:`hessian_trace` returns.

    Attributes:
        value: mean of z'Hz over random vectors z.
        standard_error: of ``value``, from how the samples differ.
        samples: how many there were.
    """

    value: float
    standard_error: float
    samples: int


def hessian_eigenvalue(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian of the mean loss over all batches, by power iteration.

    Power iteration finds the eigenvalue of largest magnitude. If that is negative, it goes on with ``H - value``, whose
    largest magnitude belongs to the largest eigenvalue. Where the smallest eigenvalue is about minus the largest, the
    vector stays a mixture of both: ``value`` lies between them, and ``converged`` is False.

    An iteration costs a forward pass, a backward pass and a backward pass through that, over all batches, and memory
    for about four vectors of all parameters and the graph of one batch's gradient. Scaled dot-product attention uses
    PyTorch's plain ("math") implementation, the one that can be differentiated twice.

    Mode, processes and what is left as it was: see :func:`sam_fast.sharpness.rho_sharpness`. Every iteration draws the
    same dropout masks, and the same order of a shuffling DataLoader.

    ``model``, ``loss_fn`` and ``progress`` are as in :func:`sam_fast.sharpness.rho_sharpness`.

    Args:
        batches: a list or a DataLoader: every iteration goes through all of it.
        tolerance: relative; stop when the error bound is at most ``tolerance * |value|``.
        max_iterations: stop after so many in any case; then ``converged`` is False.
        seed: of the first vector.

    Raises:
        TypeError: an argument is of the wrong type, or ``loss_fn`` returns no tensor.
        ValueError: an argument is out of range; ``batches`` is empty, or an iterator, which can be used once; the loss
            is no scalar or not finite; the model has no trainable parameters, complex ones, or is sharded (FSDP2).
    """
    check_above_zero("tolerance", tolerance)
    check_count("max_iterations", max_iterations)
    measured = _measurement(model, loss_fn, batches, "hessian_eigenvalue()")
    if isinstance(batches, Iterator):
        raise ValueError("batches is an iterator, which is used up after one iteration: pass a list or a DataLoader")
    shift, found = 0.0, Eigenvalue(math.nan, math.inf, 0, False)
    with measured.leaving_no_trace(), measured.progress(progress, "eigenvalue", max_iterations) as tick:
        state, generators = measured.random_state(), _generators(measured, seed)
        v = _unit([torch.empty_like(p).normal_(generator=generators[p.device]) for p in measured.params])
        for iteration in range(1, max_iterations + 1):
            state.apply()
            product = _mean_product(measured, v)
            value = _dot(v, product)
            _check_finite(value)
            rest = [hv - value * along for hv, along in zip(product, v, strict=True)]
            bound = math.sqrt(_dot(rest, rest))
            is_eigenvalue = bound <= tolerance * abs(value)
            found = Eigenvalue(value, bound, iteration, is_eigenvalue and (value >= 0.0 or shift > 0.0))
            tick()
            if found.converged:
                break
            if is_eigenvalue:  # the smallest
                shift = -value
                product = [torch.empty_like(p).normal_(generator=generators[p.device]) for p in measured.params]
            elif shift:
                torch._foreach_add_(product, v, alpha=shift)
            v = _unit(product)
    return found


def hessian_trace(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    *,
    samples: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Trace:
    """The trace of the Hessian of the mean loss over all batches: Hutchinson's estimate, the mean of z'Hz over vectors
    z of random signs (Rademacher).

    Costs a forward and a backward pass over the batches, which are gone through once, and ``samples`` backward passes
    through the backward pass. For the rest see :func:`hessian_eigenvalue`.

    ``model``, ``loss_fn``, ``batches`` and ``progress`` are as in :func:`sam_fast.sharpness.rho_sharpness`.

    Args:
        samples: at least 2.
        seed: of the random signs.

    Raises:
        TypeError, ValueError: as :func:`hessian_eigenvalue`, except that an iterator will do.
    """
    check_count("samples", samples, at_least=2)
    measured = _measurement(model, loss_fn, batches, "hessian_trace()")
    sums, total = [0.0] * samples, 0
    with measured.leaving_no_trace(), measured.progress(progress, "trace", measured.count) as tick:
        generators = _generators(measured, seed)
        for batch, rows in measured.each_batch():
            grads = _differentiable_gradients(measured, batch)
            for index in range(samples):
                z = [torch.empty_like(p).bernoulli_(generator=generators[p.device]) for p in measured.params]
                z = [2 * bits - 1 for bits in z]
                sums[index] += rows * _dot(z, _product(measured, grads, z, index + 1 < samples))
            total += rows
            tick()
    traces = measured.means(sums, total)
    _check_finite(float(traces.sum()))
    return Trace(float(traces.mean()), float(traces.std()) / math.sqrt(samples), samples)


def _measurement(model: nn.Module, loss_fn: Callable[..., Tensor], batches: Iterable[Any], what: str) -> Measurement:
    measured = Measurement(model, loss_fn, batches, what)
    if any(p.is_complex() for p in measured.params):
        raise ValueError(f"{what} is for real parameters, and model has complex ones")
    return measured


def _check_finite(value: float) -> None:
    if not math.isfinite(value):
        raise ValueError("the Hessian of loss_fn times a vector is not finite: measure in float32 or float64")


def _generators(measured: Measurement, seed: int) -> dict[torch.device, torch.Generator]:
    return {device: generator(device, seed) for device in {p.device for p in measured.params}}


def _differentiable_gradients(measured: Measurement, batch: Sequence[Any]) -> list[Tensor | None]:
    with sdpa_kernel(SDPBackend.MATH):
        return measured.gradients(measured.loss(batch), create_graph=True)


def _product(measured: Measurement, grads: Sequence[Tensor | None], v: Sequence[Tensor], keep: bool) -> list[Tensor]:
    """The Hessian, whose rows are the derivatives of ``grads``, times ``v``."""
    pairs = [(g, along) for g, along in zip(grads, v, strict=True) if g is not None and g.requires_grad]
    if not pairs:  # the loss is linear
        return [torch.zeros_like(p) for p in measured.params]
    outputs, weights = zip(*pairs, strict=True)
    products = torch.autograd.grad(outputs, measured.params, weights, retain_graph=keep, materialize_grads=True)
    return list(products)


def _mean_product(measured: Measurement, v: Sequence[Tensor]) -> list[Tensor]:
    """The Hessian of the mean loss over all batches of all processes, times ``v``."""
    total, rows_so_far = [torch.zeros_like(p) for p in measured.params], 0
    for batch, rows in measured.each_batch():
        grads = _differentiable_gradients(measured, batch)
        torch._foreach_add_(total, _product(measured, grads, v, keep=False), alpha=rows)
        rows_so_far += rows
    count = measured.numbers(rows_so_far)
    measured.add_over_replicas(count, *total)
    torch._foreach_div_(total, not_empty(count))
    return total


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product, added up in float32 or better."""
    wide = [torch.promote_types(x.dtype, torch.float32) for x in a]
    products = (torch.sum(x.to(dtype) * y.to(dtype)) for x, y, dtype in zip(a, b, wide, strict=True))
    return math.fsum(map(float, products))


def _unit(v: list[Tensor]) -> list[Tensor]:
    torch._foreach_div_(v, math.sqrt(_dot(v, v)))
    return v
