"""The state of the random generators, which the second pass may draw from again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .devices import refuse_capture


class RandomState:
    """The state of torch's default generators, the CPU's and those of some devices, and of further ones."""

    def __init__(self, states: list[tuple[Any, Tensor]]) -> None:
        self._states = states

    @staticmethod
    def capture(devices: Iterable[torch.device], others: Iterable[torch.Generator] = ()) -> RandomState:
        """Read the generators of the CPU and of ``devices``, and ``others``. Nothing waits for a device.

        Raises:
            RuntimeError: a graph is being captured on one of them.
        """
        states: list[tuple[Any, Tensor]] = [(None, torch.get_rng_state())]
        for device in sorted(devices, key=str):
            refuse_capture(
                device,
                "replay_rng=True reads and sets the random state on the host, once, and a replayed graph would not. "
                "Capture the step without "
                "it; the second pass then draws masks of its own",
            )
            module: Any = getattr(torch, device.type, None)
            if device.type != "cpu" and hasattr(module, "get_rng_state"):
                states.append((device, module.get_rng_state(device)))
        states += [(other, other.get_state()) for other in others]
        return RandomState(states)

    def apply(self) -> None:
        """Set the generators to this state."""
        for device, state in self._states:
            if device is None:
                torch.set_rng_state(state)
            elif isinstance(device, torch.Generator):
                device.set_state(state)
            else:
                getattr(torch, device.type).set_rng_state(state, device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from this state inside; outside the generators go on as if nothing had been drawn."""
        devices = {device for device, _ in self._states if isinstance(device, torch.device)}
        outside = RandomState.capture(devices, [own for own, _ in self._states if isinstance(own, torch.Generator)])
        self.apply()
        try:
            yield
        finally:
            outside.apply()
