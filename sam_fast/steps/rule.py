"""Rules: how families of base optimizers step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer


class NotFused(Exception):
    """Restoring and stepping cannot be one pass here; the message says why. The weights have not been changed."""


class MissingState(NotFused):
    """The base optimizer has yet to make a state of some parameter."""


def wrong_state(name: str, missing: bool) -> NotFused:
    """The error for a state that is missing, or else not laid out as its tensor."""
    if missing:
        return MissingState(f"the base optimizer has yet to make the state {name!r} of a parameter")
    return NotFused(f"the base optimizer's state {name!r} is not as PyTorch makes it")


class Rule(ABC):
    """How one family of base optimizers steps: its name, classes, options and state, and PyTorch's own form of the
    step.

    Adding one: a file beside this one, a line in :data:`sam_fast.steps.RULES`, a struct in csrc/steps.h and a file in
    kernels/. A test compares ``options`` and ``states`` with those of csrc/steps.h.
    """

    name: ClassVar[str]
    """The name of the step in csrc/steps.h, and of the module in kernels/."""

    classes: ClassVar[tuple[str, ...]]
    """Qualified names of the optimizer classes that step like this: exactly these, no subclasses."""

    options: ClassVar[tuple[str, ...]]
    """What :meth:`values` returns, in the order of the kernel's table. The first is ``lr``."""

    states: ClassVar[tuple[str, ...]]
    """Names of the states that are tensors like the parameter, at most three."""

    counter: ClassVar[str | None] = None
    """Name of the state that counts steps, a tensor of one element."""

    group_counter: ClassVar[str | None] = None
    """Name of the group entry, a number, that counts steps."""

    @property
    def all_names(self) -> tuple[str, ...]:
        """Names of all states."""
        return self.states if self.counter is None else (*self.states, self.counter)

    @abstractmethod
    def values(self, group: dict[str, Any], base: Optimizer) -> list[Any]:
        """The options of a group of ``base``.

        Raises:
            NotFused: one of its options asks for a step that is not this one.
        """

    def takes(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the states that a parameter of this group has once it has taken a step."""
        return self.all_names

    @abstractmethod
    def first_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor] | None:
        """The state from which the kernel's step equals PyTorch's first step of a parameter. None if no state does."""

    has_fused: ClassVar[bool] = False
    """Whether :meth:`step` can use PyTorch's fused kernels."""

    @abstractmethod
    def step(
        self, options: dict[str, float], w: list[Tensor], g: list[Tensor], states: dict[str, list[Tensor]], fused: bool
    ) -> None:
        """Step in place with PyTorch's own functions; ``fused``: with its fused kernels.

        ``states[name]`` is empty where the group's options need no such state.
        """


def first_counter(param: Tensor, group: dict[str, Any]) -> Tensor:
    """A step counter as PyTorch makes it: on the host, unless the options ``capturable`` or ``fused`` ask for the
    device.
    """
    wide = torch.get_default_dtype() == torch.float64
    if group.get("capturable") or group.get("fused"):
        dtype = torch.float64 if wide and not group.get("fused") else torch.float32
        return torch.zeros((), dtype=dtype, device=getattr(param, "_local_tensor", param).device)
    return torch.tensor(0.0, dtype=torch.float64 if wide else torch.float32, device="cpu")
