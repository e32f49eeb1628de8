"""The state of the random generators, saved so that the second pass can draw the same numbers again."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .devices import refuse_capture

CPU, PYTHON, NUMPY = "cpu", "python", "numpy"
"""Generators that are known by name. Not torch.default_generator itself: a copy of it would have a state of its own."""


class RandomState:
    """The states of torch's default generators (the CPU's and those of some devices), of Python's and NumPy's, from
    which mixup and augmentation often draw, and of further torch generators.
    """

    def __init__(self, states: list[tuple[torch.device | torch.Generator | str, Any]]) -> None:
        self._states = states

    @staticmethod
    def capture(devices: Iterable[torch.device], others: Iterable[torch.Generator] = ()) -> RandomState:
        """Read the generators of the CPU, ``devices``, Python and NumPy, and ``others``. Nothing waits for a device.

        Raises:
            RuntimeError: a graph is being captured on one of them.
        """
        states: list[tuple[torch.device | torch.Generator | str, Any]] = [
            (CPU, torch.get_rng_state()),
            (PYTHON, random.getstate()),
        ]
        if "numpy.random" in sys.modules:
            states.append((NUMPY, sys.modules["numpy.random"].get_state(legacy=False)))
        for device in sorted(devices, key=str):
            refuse_capture(
                device,
                "replay_rng=True reads and sets the random state on the host, once, and a replayed graph would not. "
                "Capture the step without it; the second pass then draws masks of its own",
            )
            module: Any = getattr(torch, device.type, None)
            if device.type != "cpu" and hasattr(module, "get_rng_state"):
                states.append((device, module.get_rng_state(device)))
        states += [(other, other.get_state()) for other in others]
        return RandomState(states)

    def apply(self) -> None:
        """Set the generators to this state."""
        for source, state in self._states:
            if source == CPU:
                torch.set_rng_state(state)
            elif source == PYTHON:
                random.setstate(state)
            elif source == NUMPY:
                sys.modules["numpy.random"].set_state(state)
            elif isinstance(source, torch.Generator):
                source.set_state(state)
            elif isinstance(source, torch.device):
                getattr(torch, source.type).set_rng_state(state, source)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the generators draw from this state. Afterwards they go on as if nothing had been drawn. If entered
        again, this goes on where it ended.
        """
        outside = self._now()
        self.apply()
        try:
            yield
        finally:
            self._states = self._now()._states
            outside.apply()

    def _now(self) -> RandomState:
        """The state that the same generators have now."""
        sources = [source for source, _ in self._states]
        return RandomState.capture(
            (s for s in sources if isinstance(s, torch.device)), (s for s in sources if isinstance(s, torch.Generator))
        )
