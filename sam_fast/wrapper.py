"""An optimizer around another one: one state, one list of parameter groups, one format of checkpoints, at all times."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from .amp import ATTRIBUTES
from .base_step import BaseStep, is_scheduler_wrapper, maximizes, profiling
from .gradients import all_zero
from .options import OPTIONS, check_base, check_options, make_plain, take_over_options, without_old_weights
from .perturbation import Perturbation
from .schedule import STEP, start_counter
from .step_state import StepState

SWITCHES = ("train", "eval")
"""Methods of a base optimizer that swap the weights for others, as those of schedule-free optimizers do."""

DISTRIBUTED_CHECKPOINTS = "torch.distributed.checkpoint.state_dict"

SAVED_WHILE_PERTURBED = (
    "state_dict() between first_step() and second_step(): the model's weights are w + e now, and so a checkpoint of "
    "the model is one of w + e. Save between steps, or call optimizer.restore() first, which gives this step up"
)


class _NoBaseYet:
    """Stands for the base optimizer while ``Optimizer.__init__`` sets hooks and instrumentation up."""

    def __init__(self) -> None:
        self.state: Any = {}
        self.param_groups: list[dict[str, Any]] = []


class OptimizerWrapper(Optimizer):
    """A torch optimizer whose state and parameter groups are those of ``base_optimizer``.

    Frameworks wrap an optimizer in an object of a subclass, with a ``__dict__`` of its own that begins as a copy of the
    optimizer's or falls back on it. So what changes during a step is kept in objects that both share.
    """

    base_optimizer: Optimizer
    _base_step: BaseStep
    _known_base: Optimizer
    _perturbation: Perturbation
    _step: StepState
    _sam_defaults: dict[str, Any]
    _made_with: list[dict[str, Any]]
    _plain_step: Callable[..., Any]  # methods of SAM
    _prepare: Callable[[], None]

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        self._made_with = []
        self.base_optimizer = _NoBaseYet()  # type: ignore[assignment]
        super().__init__(groups, {})

    def _fill_in_options(self, groups: Iterable[dict[str, Any]], made_with: Sequence[dict[str, Any]] = ()) -> None:
        """Give groups the options that they lack: those of the group in the same place of ``made_with``, or else the
        constructor's.
        """
        for index, group in enumerate(groups):
            options = {**self._sam_defaults, **(made_with[index] if index < len(made_with) else {})}
            missing = {name: options[name] for name in OPTIONS if name not in group}
            check_options({**group, **missing})
            group.update(missing)

    def _note_options(self, groups: Iterable[dict[str, Any]]) -> None:
        """Note SAM's options of new groups, for the case that a state dict without them is loaded."""
        self._made_with.extend({name: group[name] for name in OPTIONS} for group in groups)

    def _work_with(self, base: Optimizer) -> None:
        """Step with ``base``: the first base optimizer, or one that was assigned in its place."""
        self._base_step = BaseStep(base, self._perturbation)
        self._perturbation.maximize = maximizes(base)
        self._known_base = base

    def _current_base(self) -> Optimizer:
        """The base optimizer. One that was put in the place of another is checked, takes the options that SAM's
        parameters have, and goes on with the counter.
        """
        base, known = self.base_optimizer, self._known_base
        if base is not known:
            check_base(base, self._perturbation.flatten)
            if any(STEP in group for group in known.param_groups):
                start_counter(base.param_groups, known.param_groups)
            self._fill_in_options(known.param_groups, self._made_with)
            take_over_options(base.param_groups, known.param_groups)
            self._fill_in_options(base.param_groups)
            self._made_with = []  # a copy may have the other base optimizer still
            self._note_options(base.param_groups)
            self._work_with(base)
        return base

    @property
    def perturbed(self) -> bool:
        """True between a ``first_step`` that perturbs and ``second_step``: the parameters hold ``w + e``."""
        return self._perturbation.active

    def _require_restored(self, what: str) -> None:
        if self._step.active or self._perturbation.active:
            raise RuntimeError(
                f"{what} is refused between first_step() and second_step(): finish with second_step(), or call "
                "restore() to give this step up. It writes w back: load the model's weights after it"
            )

    @property
    def state(self) -> Any:
        """The base optimizer's state. torch.distributed.checkpoint asks for it before anything else. If there is none
        yet, it is made for that caller.
        """
        if not self.base_optimizer.state and sys._getframe(1).f_globals.get("__name__") == DISTRIBUTED_CHECKPOINTS:
            self._make_state()
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    def __getattr__(self, name: str) -> Any:
        """Public attributes and methods that only the base optimizer has, such as ``train`` and ``eval`` of a
        schedule-free one.
        """
        # What a GradScaler sets for one step is never looked for in the base optimizer.
        if name.startswith("_") or name == "base_optimizer" or name in ATTRIBUTES:
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
            base = vars(self).get("base_optimizer", self)
            owners = (base, *type(base).__mro__) if name.startswith("_") else ()
            if any(name in getattr(owner, "__dict__", ()) for owner in owners):  # hasattr() would call properties
                text += f": it is private to the base optimizer, optimizer.base_optimizer.{name}"
            raise AttributeError(text)
        base = self.base_optimizer
        try:
            value = getattr(base, name)
        except AttributeError:
            text = (
                f"{type(self).__name__!r} object has no attribute {name!r}, nor has its base optimizer, of class "
                f"{type(base).__name__}"
            )
            place = self._place_of(name)
            raise AttributeError(text if place is None else f"{text}: {place}") from None
        return self._only_between_steps(name, value) if name in SWITCHES and callable(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to set an option or an argument of the constructor, which would change nothing. Subclasses may have
        attributes of these names.
        """
        if "_plain_step" in vars(type(self)) and (place := self._place_of(name)) is not None:
            raise AttributeError(f"setting optimizer.{name} has no effect: {place}")
        super().__setattr__(name, value)

    def _place_of(self, name: str) -> str | None:
        """Where to change an option of SAM or an argument of its constructor, neither of which is an attribute."""
        if name in OPTIONS:
            return f"it is an option of the parameter groups, optimizer.param_groups[0][{name!r}]"
        if name in (type(self).__init__.__kwdefaults__ or ()):
            return f"it is an argument of the constructor, SAM(optimizer.base_optimizer, {name}=...)"
        return None

    def _only_between_steps(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._require_restored(f"{name}()")
            return method(*args, **kwargs)

        return checked

    def __repr__(self) -> str:
        """PyTorch's, with the base optimizer's class."""
        name = type(self).__name__
        return super().__repr__().replace(name, f"{name} around {type(self.base_optimizer).__name__}", 1)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as :meth:`torch.optim.Optimizer.add_param_group`. Options it lacks take the
        constructor's values.

        Raises:
            RuntimeError: a step is under way.
            ValueError: an option is out of range, or a parameter is already in another group.
        """
        if isinstance(self.base_optimizer, _NoBaseYet):
            return
        self._require_restored("add_param_group")
        base = self._current_base()
        if isinstance(param_group, dict):
            self._fill_in_options([param_group])
        self._fill_in_options(base.param_groups, self._made_with)  # there may be groups that were added to the base
        base.add_param_group(param_group)
        self._base_step.adopt(base, base.param_groups[-1]["params"])
        try:
            self._prepare()
        except BaseException:
            self.param_groups.pop()  # a group that SAM refuses must not stay in the base optimizer
            raise
        self._note_options(self.param_groups[len(self._made_with) :])

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with SAM's options in its groups and never a copy of the weights.

        Warns while the weights are perturbed, since the model's would be saved as ``w + e``.
        """
        if self.perturbed:
            warnings.warn(SAVED_WHILE_PERTURBED, RuntimeWarning, stacklevel=2)
        base = self._current_base()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        for group in self.param_groups:
            with suppress(ValueError):  # which the next step raises
                make_plain(group)
        state_dict = base.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def _make_state(self) -> None:
        """Take a step with zero gradients, as torch.distributed.checkpoint does before it saves or loads a state. It
        does not if there are gradients, and with ``flatten=True`` there always are, even if all of them are zero.
        """
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads or not all_zero(grads):
            return
        rates = [(group, group["lr"]) for group in self.param_groups if "lr" in group]
        for group, rate in rates:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        try:
            self.base_optimizer.step()
        finally:
            for group, rate in rates:
                group["lr"] = rate

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of SAM or of a plain base optimizer. Groups that lack SAM's options take those that they
        were made with.

        A state dict of the reference implementation loads too. It holds a copy of old weights and nothing of the base
        optimizer: the copy is dropped, the base optimizer keeps the state it has, and a warning says so.

        Raises:
            RuntimeError: a step is under way.
            ValueError: the groups do not fit, or an option in them is out of range.
        """
        self._require_restored("load_state_dict")
        base, state_dict = self._current_base(), state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        # A base optimizer that wraps another one may have a format of its own.
        for group in state_dict.get("param_groups", ()):
            check_options(group)
        if "state" in state_dict:
            state_dict["state"] = without_old_weights(state_dict["state"], base)
        base.load_state_dict(state_dict)
        self._base_step.look_at(base)  # a user's own may load into the same state object
        self._fill_in_options(self.param_groups, self._made_with)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _step_leads_on(self) -> bool:
        """Whether ``second_step`` may call ``step``. The reference implementation's never does. It must not if a
        subclass's ``step`` makes both passes itself or does not call the inherited one, or if a loop has put
        ``first_step`` or ``second_step`` in its place.
        """
        steps = {"first_step", "second_step"}
        step = inspect.unwrap(type(self).step)
        code = getattr(step, "__code__", None)
        names = set(getattr(code, "co_names", ()))
        if getattr(vars(self).get("step"), "__name__", "") in steps or not steps.isdisjoint(names):
            return False
        # PyTorch puts its own around it into subclasses, too: the last class is the one that has defined it. One of a
        # framework's has its own ways to what it wraps, and so has a function made by another one.
        owner = [cls for cls in type(self).__mro__ if inspect.unwrap(vars(cls).get("step", cls)) is step][-1]
        if code is None or set(code.co_freevars) - {"__class__"} or "_plain_step" in vars(owner):
            return True
        inherited = {"super", *(cls.__name__ for cls in owner.__mro__)}
        return not issubclass(owner, OptimizerWrapper) or not names.isdisjoint(inherited)

    def _is_watched(self) -> bool:
        """Whether somebody must see :meth:`step` being called: a hook, a profiler, a subclass.

        PyTorch wraps ``step`` for them, which takes longer than the rest of a small step.
        """
        hooks = (
            self._optimizer_step_pre_hooks,
            self._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )
        replaced = "step" in vars(self) and not is_scheduler_wrapper(vars(self)["step"], self)
        if any(hooks) or replaced or profiling():
            return True
        # Nobody, if what PyTorch has wrapped is SAM's own step and not a subclass's.
        return getattr(type(self).step, "__wrapped__", type(self).step) is not self._plain_step
