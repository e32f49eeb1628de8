"""What surrounds a forward and backward pass: random state and gradient synchronisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .devices import refuse_capture
from .storage.fsdp import is_fsdp_module, own_gradients


class RandomState:
    """The state of torch's default generators: the CPU's and those of some devices."""

    def __init__(self, states: list[tuple[Any, Tensor]]) -> None:
        self._states = states

    @staticmethod
    def capture(devices: Iterable[torch.device]) -> RandomState:
        """Read the generators of the CPU and of ``devices``. Nothing waits for a device.

        Raises:
            RuntimeError: a graph is being captured on one of them.
        """
        states: list[tuple[Any, Tensor]] = [(None, torch.get_rng_state())]
        for device in sorted(devices, key=str):
            refuse_capture(
                device,
                "replay_rng=True reads and sets the random state on the host, once, and a replayed graph would not. Capture the step without "
                "it; the second pass then draws masks of its own",
            )
            module: Any = getattr(torch, device.type, None)
            if device.type != "cpu" and hasattr(module, "get_rng_state"):
                states.append((device, module.get_rng_state(device)))
        return RandomState(states)

    def apply(self) -> None:
        """Set the generators to this state."""
        for device, state in self._states:
            if device is None:
                torch.set_rng_state(state)
            else:
                getattr(torch, device.type).set_rng_state(state, device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from this state inside; outside the generators go on as if nothing had been drawn."""
        outside = RandomState.capture({device for device, _ in self._states if device is not None})
        self.apply()
        try:
            yield
        finally:
            outside.apply()


@contextmanager
def without_gradient_sync(model: Any) -> Iterator[None]:
    """Run forward and backward of ``model`` without gradient synchronisation, wherever in it a DDP or FSDP2 module is.

    For any other model there is none to leave out.

    Raises:
        ValueError: an FSDP2 module is sharded over all processes, so that no process has a gradient of its own; or a DDP module with a static
            graph has not had a pass with synchronisation yet.
    """
    with ExitStack() as stack:
        modules: Iterable[Any] = model.modules() if isinstance(model, nn.Module) else [model]
        for module in modules:
            if hasattr(type(module), "no_sync"):
                if getattr(module, "static_graph", False) and not getattr(module, "_static_graph_delay_allreduce_enqueued", True):
                    raise ValueError(
                        "first_pass(model, sync=False) cannot be the first pass of DistributedDataParallel(static_graph=True), which learns the "
                        "graph in a backward pass with synchronisation: use sync=True in the first step"
                    )
                stack.enter_context(module.no_sync())
            elif is_fsdp_module(module):
                stack.enter_context(own_gradients(module))
            elif hasattr(type(module), "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
        yield
