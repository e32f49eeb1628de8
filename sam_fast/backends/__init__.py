"""The backends, in one list, and the one place that chooses between them.

A backend is one module with a ``BACKEND``. To add one, write that file, and add it to :data:`BACKENDS` and
:data:`PREFERENCE`.
"""

from __future__ import annotations

import os
import warnings

import torch as pytorch
from torch import Tensor, device, version

from . import cpu, cuda, torch, triton
from .bucket import Backend, Bucket, GroupOptions, StepOptions
from .native import build_note

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (cpu.BACKEND, cuda.BACKEND, triton.BACKEND, torch.BACKEND)
}

PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch"),
    "cuda": ("cuda", "triton", "torch"),
    "xpu": ("triton", "torch"),
}
"""Device type -> backends, best first. A device that is not listed takes ``torch``."""

BACKEND_VARIABLE = "SAM_FAST_BACKEND"
"""Environment variable that forces a backend where the ``backend`` argument does not."""

_warned: set[tuple[str, str]] = set()


def available() -> list[str]:
    """The names of the backends that can be used here."""
    return [name for name, backend in BACKENDS.items() if backend.unavailable() is None]


def why_not() -> dict[str, str]:
    """The reason for every backend that cannot be used here."""
    reasons = {name: backend.unavailable() for name, backend in BACKENDS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def unusable_devices() -> dict[str, str]:
    """The reasons why backends that can be used here cannot be used on some GPU, by backend and device."""
    devices = [
        device(kind, index) for kind in ("cuda", "xpu") for index in range(getattr(pytorch, kind).device_count())
    ]
    pairs = [(name, on) for name in available() for on in devices if name in _preferred(on.type)]
    reasons = {f"{name} on {on}": BACKENDS[name].unusable_on(on) for name, on in pairs}
    return {where: reason for where, reason in reasons.items() if reason is not None}


def build_info() -> dict[str, str]:
    """How the native modules were built and which instruction set is in use."""
    return build_note() | {
        f"{name}: {what}": value for name, backend in BACKENDS.items() for what, value in backend.build_info().items()
    }


def forced(backend: str | None) -> Backend | None:
    """The backend that the argument or ``SAM_FAST_BACKEND`` forces, if any.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it cannot be used here.
    """
    name = backend or os.environ.get(BACKEND_VARIABLE) or None
    if name is None:
        return None
    source = "backend" if backend else BACKEND_VARIABLE
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is unknown: use one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{source}={name!r} cannot be used: {reason}")
    return BACKENDS[name]


def _preferred(device_type: str) -> tuple[str, ...]:
    names = PREFERENCE.get(device_type, ())
    # PyTorch calls an AMD GPU "cuda" too. CUDA kernels cannot serve it, which is not worth a warning.
    return tuple(name for name in names if name != "cuda") if version.hip else names


def choose(tensor: Tensor, backend: str | None = None, arithmetic: bool = True) -> Backend:
    """The backend for ``tensor``: the forced one, else the best for its device that takes it. See :data:`PREFERENCE`.

    Without ``arithmetic`` the tensor is only to be saved and restored.

    Raises:
        ValueError: the forced backend is unknown or does not take this tensor.
        RuntimeError: the forced backend cannot be used here.
    """
    wanted = forced(backend)
    if wanted is not None:
        reason = wanted.rejects(tensor, arithmetic)
        if reason is None and (unusable := wanted.unusable_on(tensor.device)) is not None:
            reason = f"a tensor on {tensor.device}: {unusable}"
        if reason is not None:
            raise ValueError(f"backend={wanted.name!r} was forced but does not support {reason}")
        return wanted
    for name in _preferred(tensor.device.type):
        candidate = BACKENDS[name]
        reason = candidate.unavailable()
        if reason is None:
            if candidate.rejects(tensor, arithmetic) is not None:
                continue
            reason = candidate.unusable_on(tensor.device)  # asked last: it may compile something
            if reason is None:
                return candidate
        if (name, reason) not in _warned:
            _warned.add((name, reason))
            warnings.warn(
                f"sam_fast falls back from its {name} backend to a slower one: {reason}", RuntimeWarning, stacklevel=3
            )
    return torch.BACKEND


__all__ = [
    "BACKENDS",
    "PREFERENCE",
    "Backend",
    "Bucket",
    "GroupOptions",
    "StepOptions",
    "available",
    "build_info",
    "choose",
    "forced",
    "why_not",
]
