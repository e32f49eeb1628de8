"""The state of the random generators, saved so that the second pass can draw the same numbers again."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from .devices import refuse_capture

Access = tuple[Callable[[], Any], Callable[[Any], Any]]
"""What reads the state of a generator, and what sets it."""


class RandomState:
    """The states of torch's default generators (the CPU's and those of some devices), of Python's and NumPy's, from
    which mixup and augmentation often draw, and of further torch generators.
    """

    def __init__(self, generators: list[Access]) -> None:
        self._generators = generators
        self._states = [read() for read, _ in generators]

    @staticmethod
    def capture(devices: Iterable[torch.device], others: Iterable[torch.Generator] = ()) -> RandomState:
        """Read the generators of the CPU, ``devices``, Python and NumPy, and ``others``. Nothing waits for a device.

        Raises:
            RuntimeError: a graph is being captured on one of them.
        """
        generators: list[Access] = [(torch.get_rng_state, torch.set_rng_state), (random.getstate, random.setstate)]
        numpys = sys.modules.get("numpy.random")
        if numpys is not None:
            generators.append((partial(numpys.get_state, legacy=False), numpys.set_state))
        for device in sorted(devices, key=str):
            module: Any = getattr(torch, device.type, None)
            if device.type != "cpu" and hasattr(module, "get_rng_state"):
                generators.append((partial(_read, device), partial(module.set_rng_state, device=device)))
        generators += [(other.get_state, other.set_state) for other in others]
        return RandomState(generators)

    def apply(self) -> None:
        """Set the generators to this state."""
        for (_, write), state in zip(self._generators, self._states, strict=True):
            write(state)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the generators draw from this state. Afterwards they go on as if nothing had been drawn. If entered
        again, this goes on where it ended.
        """
        outside = RandomState(self._generators)
        self.apply()
        try:
            yield
        finally:
            self._states = RandomState(self._generators)._states
            outside.apply()


def _read(device: torch.device) -> Any:
    refuse_capture(
        device,
        "replay_rng=True reads and sets the random state on the host, once, and a replayed graph would not. Capture "
        "the step without it; the second pass then draws masks of its own",
    )
    return getattr(torch, device.type).get_rng_state(device)
