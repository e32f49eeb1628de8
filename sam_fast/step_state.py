"""What an optimizer keeps between the calls of one step."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .random_state import RandomState

DELETED = (
    "a SAM was deleted between first_step() and second_step(), and nothing can restore the weights any more: they are "
    "w + e, unless something else has written them since. Run the second pass in `with optimizer.second_pass(model):`, "
    "or call optimizer.restore() to give a step up"
)

NOT_STEPPED = "there was no second step yet"


@dataclass(eq=False)
class StepState:
    """What a step keeps between its calls, shared with whatever a framework puts around the optimizer."""

    active: bool = False  # first_step was called, whether it perturbed or not, and the step is not over
    thread: int = 0  # the one that called it
    first_pass_done: bool = False  # there was a first pass, whose batch has counted in the running statistics
    perturbs: bool = False  # the norm is that of this step's first gradient
    finishing: bool = False  # step was called by second_step, or the other way round
    zeroed: bool = False  # there was no step since zero_grad: gradients that are not new are zero

    random_states: list[RandomState] = field(default_factory=list)  # one for each first_pass(replay_rng=True)
    own_gradient: bool = False  # the gradient of this rank alone
    without_sync: bool = False  # inside first_pass(sync=False)
    first_pass_entered: bool = False
    unused: list[Tensor] = field(default_factory=list)  # weights that require no gradient in first_pass
    path: str = NOT_STEPPED
    clip_grad_norm: float | None = None  # of the second gradient, for one step
    grad_scale: Tensor | None = None  # what a GradScaler has set, for one step
    found_inf: Tensor | float | None = None
    unscaling_is_right: bool = False  # amp.check_unscaled need not look again
    warned_of_gradients: bool = False

    def __del__(self) -> None:
        if self.active and self.perturbs and not sys.is_finalizing():
            warnings.warn(DELETED, RuntimeWarning, stacklevel=2)

    def forget_first_pass(self) -> None:
        """Forget the arguments of ``first_pass``, which hold for one step."""
        self.train_unused()
        self.random_states.clear()
        self.own_gradient, self.first_pass_entered = False, False

    def next_random_state(self) -> RandomState | None:
        """The state the next second pass draws from: those of the first passes in turn, the last one repeatedly."""
        states = self.random_states
        return states.pop(0) if len(states) > 1 else next(iter(states), None)

    def require_sync(self, what: str) -> None:
        """Raise RuntimeError where the second pass's gradients would be those of this process alone."""
        if self.without_sync:
            raise RuntimeError(
                f"{what} inside first_pass(model, sync=False), where gradients are not synchronised: end the block "
                "before the second pass"
            )

    def train_unused(self) -> None:
        """Let the weights that required no gradient in ``first_pass`` require one again."""
        for p in self.unused:
            p.requires_grad = True
        self.unused = []

    def end(self) -> None:
        """The step is over, or was given up."""
        self.active, self.first_pass_done, self.perturbs = False, False, False


def set_by_scaler(name: str) -> property:
    """An attribute that a GradScaler sets on the optimizer, or on a framework's wrapper around it. It exists only while
    it is set.
    """

    def get(self: Any) -> Any:
        value = getattr(self._step, name)
        if value is None:
            raise AttributeError(f"no GradScaler has set {name}")
        return value

    return property(
        get, lambda self, value: setattr(self._step, name, value), lambda self: setattr(self._step, name, None)
    )
