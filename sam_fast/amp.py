"""Mixed precision: a step whose gradients torch.amp.GradScaler has scaled, and which is skipped if either pass
overflowed.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .devices import need_not_wait

ATTRIBUTES = ("grad_scale", "found_inf")
"""Attributes that a GradScaler sets on an optimizer whose step handles scaled gradients, and removes after the step."""

TOO_LARGE = 256.0
"""If the second gradient is more than this many times as large as the first, only the first was unscaled."""

_warned: set[str] = set()


@dataclass(frozen=True)
class Scaling:
    """What the second step has to know about its gradients. Both are None without a scaler.

    Args:
        grad_scale: what the gradients are multiplied by (0-d, on a device), or None if they are not scaled (any more).
        found_inf: 1.0 if there must be no update, because the gradients of either pass are not finite, else 0.0 (0-d
            float32, on a device).
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None

    def on(self, device: torch.device) -> Scaling:
        """The same on another device. The host waits only for what is copied to the CPU."""
        numbers, at_once = (self.grad_scale, self.found_inf), need_not_wait(device)
        return Scaling(*(None if number is None else number.to(device, non_blocking=at_once) for number in numbers))


UNSCALED = Scaling(None, None)
"""Without a scaler."""


def scaling_of(grad_scale: Tensor | None, found_inf: Tensor | float | None, norm: Tensor | None) -> Scaling:
    """The scaling of the step that a GradScaler is calling, as tensors on the device: nothing waits for them.

    Args:
        grad_scale: what the scaler has set on the optimizer.
        found_inf: likewise.
        norm: the norm of the first gradient, which is not finite if the first pass overflowed; None if an overflow
            there must not count.
    """
    if found_inf is None:
        return Scaling(grad_scale, None)
    if not isinstance(found_inf, Tensor):
        found_inf = torch.tensor(float(found_inf))  # the scaler found no gradients: its sum is the int 0
    overflow = found_inf != 0
    if norm is not None:
        overflow |= ~norm.isfinite().to(overflow.device)
    # exactly 0 or 1: fused optimizers subtract it from their step counters
    return Scaling(grad_scale, overflow.to(torch.float32))


def check_unscaled(optimizer: Any) -> None:
    """Raise RuntimeError if a GradScaler takes the second gradients of ``optimizer``, a SAM, for unscaled because
    ``unscale_`` was called before ``first_step``. The update would be thousands of times too large.

    Only the size of the gradients shows the mistake. Reading it waits for the device, so nothing is checked again after
    the first step that was right. With adaptive groups nothing is checked: their norm is not that of the gradient.
    """
    step = optimizer._step
    adaptive = any(group["adaptive"] for group in optimizer.param_groups)
    if step.unscaling_is_right or not step.perturbs or step.grad_scale is not None or adaptive:
        return
    if optimizer._perturbation.storage.process_wide:  # each process sees a part, and all must decide alike
        return
    scaler = next(filter(None, map(_scaler_in, _callers())), None)
    if scaler is not None and scaler.get_scale() <= TOO_LARGE:  # too small a scale to stand out
        return
    grads = [g.detach() for g in optimizer._gradients() if g.layout == torch.strided and g.numel() > 0]
    second = math.hypot(
        *(float(torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))) for g in grads)
    )
    first = float(optimizer.grad_norm)
    if not (0.0 < first < math.inf and 0.0 < second < math.inf):
        return
    if second > TOO_LARGE * first:
        raise RuntimeError(
            f"the second gradient is {second / first:.0f} times as large as the first: scaler.unscale_(optimizer) was "
            "called before first_step(), and the second pass's gradients are still scaled. Call it after the second "
            "backward pass, if at all: the perturbation does not depend on the scale"
        )
    step.unscaling_is_right = True


def step_base(base: Optimizer, scaling: Scaling, step: Callable[[Optimizer], None]) -> None:
    """Step the base optimizer with gradients scaled as ``scaling`` says. If there must be no update, its state stays as
    it was.

    ``step(base)`` calls ``base.step()``.

    A base optimizer that can decide on the device (``fused=True``) does so, once it has its state. Otherwise the host
    reads ``found_inf``.

    Raises:
        ValueError: gradients are float16, and the base optimizer does not unscale them itself. Unscaling them in place
            would lose the small ones.
    """
    if scaling.grad_scale is None and scaling.found_inf is None:
        step(base)
        return
    # On the CPU a fused step may be replaced by one that does not decide, see base_step.FUSED_ON_CPU.
    decides = getattr(base, "_step_supports_amp_scaling", False) and not _is_on_host(scaling)
    # A fused step that makes its state and is then skipped leaves that state behind: SGD's momentum buffer would be
    # uninitialized memory.
    on_host = not decides or _lacks_state(base)
    if on_host and scaling.found_inf is not None and scaling.found_inf.item():
        return
    if not decides:
        if scaling.grad_scale is not None:
            unscale(base, scaling.grad_scale)
        step(base)
        return
    try:
        for name in ATTRIBUTES:
            setattr(base, name, getattr(scaling, name))
        step(base)
    finally:
        clear_scaling(base)


def _is_on_host(scaling: Scaling) -> bool:
    return any(t is not None and t.device.type == "cpu" for t in (scaling.grad_scale, scaling.found_inf))


def inverse_scale(grad_scale: Tensor) -> Tensor:
    """The reciprocal as GradScaler takes it: in float64 (which MPS does not have), rounded to float32."""
    return grad_scale.reciprocal() if grad_scale.device.type == "mps" else grad_scale.double().reciprocal().float()


def without_scale(norm: Tensor, scaler: Any) -> Tensor:
    """The norm of the unscaled gradients, from that of gradients scaled by ``scaler``, which may be None."""
    return norm if scaler is None else norm / scaler.scale(torch.ones_like(norm))


def _lacks_state(base: Optimizer) -> bool:
    # SGD without momentum never has any.
    return any(
        p.grad is not None and not base.state.get(p)
        for group in base.param_groups
        if group.get("momentum") != 0
        for p in group["params"]
    )


def unscale(base: Optimizer, grad_scale: Tensor) -> None:
    """Divide the gradients by the scale, with the operation and the bits of GradScaler.unscale_."""
    alike: dict[tuple[torch.device, torch.dtype, type], list[Tensor]] = {}  # DTensors apart from others
    for group in base.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                grad = p.grad._values() if p.grad.is_sparse else p.grad
                alike.setdefault((grad.device, grad.dtype, type(grad)), []).append(grad)
    if any(dtype == torch.float16 for _, dtype, _ in alike):
        raise ValueError("gradients in float16 are too small to be unscaled: keep float32 parameters and use autocast")
    inverse = inverse_scale(grad_scale)
    for (device, _, _), grads in alike.items():
        # the operation also looks for overflows, which the scaler has done already
        checked = torch.zeros((), dtype=torch.float32, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, checked, inverse.to(device))


def report_overflow(optimizer: Optimizer, scaling: Scaling) -> None:
    """Tell the next ``GradScaler.update()`` about an overflow in the first pass, which the present gradients no longer
    show. Nothing waits for the device, except under Accelerate.

    A scaler hands the optimizer the sum of what it has found, but neither the tensors that update() reads nor itself.
    It is found up the call stack, beyond any schedulers, hooks and profilers. If it is not there, one warning says so.

    Accelerate wraps ``step`` to learn whether it was called, and treats a step that was not called as skipped. Its
    wrapper is told about the overflow, too.
    """
    found_inf = scaling.found_inf
    if found_inf is None:
        return
    for frame in _callers():
        accelerated = frame.f_locals.get("accelerated_optimizer") if frame.f_code.co_name == "patched_step" else None
        if accelerated is not None:
            # waits for the device, as Accelerate does with any optimizer
            accelerated._accelerate_step_called = not bool(found_inf)
        if (scaler := _scaler_in(frame)) is not None:
            break
    else:
        _warn_once("step() was not called by torch.amp.GradScaler")
        return
    try:
        given = frame.f_locals.get("optimizer", optimizer)  # may be a framework's wrapper
        scaler._per_optimizer_states[id(given)]["found_inf_per_device"][found_inf.device] = found_inf
    except (AttributeError, KeyError, TypeError) as error:
        _warn_once(f"this version of {type(scaler).__name__} has other internals ({type(error).__name__}: {error})")


def _callers() -> Iterator[FrameType]:
    """The frames of the functions under way, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_under_way(function: Callable[..., Any]) -> bool:
    """Whether a function has been called and has not returned. Only the function itself counts, not its decorators."""
    code = inspect.unwrap(function).__code__
    return any(frame.f_code is code for frame in _callers())


def _scaler_in(frame: FrameType) -> GradScaler | None:
    """The scaler, if the frame is that of a GradScaler's ``step``."""
    scaler = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
    return scaler if isinstance(scaler, GradScaler) else None


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        text = (
            "the gradient scaler cannot be told if only the first pass of SAM overflows, and will not lower its scale "
            f"then: {reason}"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def clear_scaling(optimizer: Optimizer) -> None:
    """Remove what a scaler has set."""
    for name in ATTRIBUTES:
        if hasattr(optimizer, name):
            delattr(optimizer, name)
