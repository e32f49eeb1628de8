"""Checks what a user gives SAM (parameters, options, a base optimizer, a state dict), and brings it into the form that
the rest of the package expects.
"""

from __future__ import annotations

import dis
import inspect
import math
import pkgutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise
from numbers import Integral, Number
from typing import Any

from torch import Tensor, autograd, nn
from torch.optim import SGD, Optimizer

OPTIONS = ("rho", "adaptive", "eta", "perturb")
"""The options that SAM adds to every parameter group."""

FLAGS = ("adaptive", "perturb")
"""Those of them that are true or false."""

OLD_WEIGHTS, PERTURBATION = "old_p", "e_w"
"""The state entries in which the reference implementation keeps its backup, and older versions of it e. Both are saved.
"""


def without_old_weights(state: dict[Any, Any], base: Optimizer) -> dict[Any, Any]:
    """The state in a checkpoint of the reference implementation, without its copy of the weights. If nothing is left,
    the state that ``base`` has: the reference implementation keeps it, too, when it loads such a checkpoint.
    """
    entries = [entry for entry in state.values() if isinstance(entry, dict)]
    if not any(OLD_WEIGHTS in entry or entry.keys() == {PERTURBATION} for entry in entries):
        return state
    kept = {key: {name: value for name, value in entry.items() if name != OLD_WEIGHTS} for key, entry in state.items()}
    # Beside other entries e is a variant's, which may go on with it.
    kept = {key: entry for key, entry in kept.items() if entry.keys() - {PERTURBATION}}
    if kept:
        return kept
    warnings.warn(
        "this checkpoint is the reference implementation's, which saves no state of the base optimizer: the base "
        "optimizer goes on with the state it has. If it is a new one, its momentum starts anew",
        UserWarning,
        stacklevel=3,
    )
    return base.state_dict().get("state", {})  # type: ignore[no-any-return]


def check_variant(cls: Any, sam: Any) -> None:
    """Raise TypeError if ``cls``, a subclass of ``sam``, has something of its own that its first_step does not do."""
    if cls.first_step is not sam.first_step:
        return
    if cls._grad_norm is not sam._grad_norm:
        raise TypeError(
            f"{cls.__name__} has a _grad_norm of its own, which first_step() does not call: give it both steps of its "
            "own, too, or a first_step that changes p.grad and calls super().first_step()"
        )
    methods = [item for c in cls.__mro__[: cls.__mro__.index(sam)] for item in vars(c).items()]
    codes = [(name, getattr(inspect.unwrap(method), "__code__", None)) for name, method in methods]
    old = {OLD_WEIGHTS, PERTURBATION}
    using = [(name, code) for name, code in codes if code is not None and not old.isdisjoint(code.co_consts)]
    if using and all(name == "second_step" and "super" not in code.co_names for name, code in using):
        raise TypeError(
            f"{cls.__name__} has a second_step that looks for state[p]['old_p'] or ['e_w'], which the inherited "
            "first_step() does not write: give it a first_step of its own, too, or change p.grad and call "
            "super().second_step(), which puts w back"
        )


def make_base(params: Any, base_optimizer: Any, base_kwargs: dict[str, Any]) -> Callable[[list[dict[str, Any]]], Any]:
    """A function that makes the base optimizer from the parameter groups.

    Raises:
        TypeError: ``base_optimizer`` is not callable, or ``params`` is an optimizer and another one is asked for.
        ValueError: ``base_optimizer`` is not an import path.
    """
    if isinstance(params, Optimizer):
        if base_kwargs or base_optimizer is not SGD:
            given = sorted(base_kwargs) if base_kwargs else f"base_optimizer={base_optimizer!r}"
            raise TypeError(
                f"SAM(optimizer) takes the optimizer as it is, but {given} was given too: make the optimizer with "
                "these options"
            )
        check_base(params)
        return lambda groups: params
    if isinstance(base_optimizer, str):
        try:
            found = pkgutil.resolve_name(base_optimizer)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f'base_optimizer={base_optimizer!r} is not an import path such as "torch.optim.SGD": {error}'
            ) from None
    else:
        found = base_optimizer
    if not callable(found):
        made = f"an existing {type(base_optimizer).__name__}: pass it in place of params, SAM(optimizer, rho=0.05)"
        raise TypeError(
            "base_optimizer must be an Optimizer class or a callable that returns an Optimizer, got "
            f"{made if isinstance(base_optimizer, Optimizer) else repr(base_optimizer)}"
        )
    # Some, such as MuonWithAuxAdam, refuse entries that they do not know: the options are taken over afterwards.
    return lambda groups: found(
        [{k: v for k, v in group.items() if k not in OPTIONS} for group in groups], **base_kwargs
    )


def take_over_options(made: list[dict[str, Any]], given: list[dict[str, Any]]) -> None:
    """Give the groups that a base optimizer has made SAM's options, from the groups in which their parameters came.

    Raises:
        ValueError: a group mixes parameters that came with different options.
    """
    options_of = {id(p): {name: group[name] for name in OPTIONS} for group in given for p in _tensors(group["params"])}
    for index, group in enumerate(made):
        if all(name in group for name in OPTIONS):
            continue
        found = [options_of[id(p)] for p in group["params"] if id(p) in options_of]
        if not found and len(made) == len(given):  # no parameters, or the base has replaced them
            found = [given[index]]
        for name in OPTIONS if found else ():
            if any(options[name] != found[0][name] for options in found):
                raise ValueError(
                    f"group {index} of the base optimizer mixes parameters that were given with different {name}: keep "
                    "them apart"
                )
            group.setdefault(name, found[0][name])


def warn_of_kept_options(groups: list[dict[str, Any]], given: dict[str, Any]) -> None:
    """Warn of arguments without effect, because all groups of an existing optimizer have SAM's options: from an earlier
    SAM around it, or from a checkpoint.
    """
    if not all(group.keys() >= set(OPTIONS) for group in groups):
        return
    kept = [name for name in OPTIONS[:3] if not any(group[name] == given[name] for group in groups)]
    if kept:
        has, argument = (", ".join(f"{name}={values[name]!r}" for name in kept) for values in (groups[0], given))
        warnings.warn(
            f"the parameter groups have SAM's options already, from an earlier SAM or a checkpoint, and keep {has}, "
            f"not {argument}: set them in optimizer.param_groups",
            RuntimeWarning,
            stacklevel=3,
        )


def _tensors(params: Any) -> list[Tensor]:
    """The parameters of a group, named or not."""
    return [p[1] if isinstance(p, tuple) else p for p in ([params] if isinstance(params, Tensor) else params)]


def as_groups(params: Iterable[Any] | Optimizer) -> list[dict[str, Any]]:
    """The parameter groups as new dictionaries; of an optimizer, its own groups."""
    if isinstance(params, Optimizer):
        return params.param_groups
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be an iterable of tensors, named tensors or parameter groups, got a tensor: wrap it in a list"
        )
    if isinstance(params, set):
        warnings.warn(
            "optimizer parameters need to be organized in ordered collections: the order of a set changes from run to "
            "run, and a checkpoint's state would go to other parameters. Pass a list",
            FutureWarning,  # as in torch 2.15, with the same first words
            stacklevel=3,
        )
    if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):  # some iterate over modules
        raise TypeError(f"params must be parameters, got a model, {type(params).__name__}: pass model.parameters()")
    if hasattr(params, "param_groups"):
        raise TypeError(
            f"SAM(optimizer) needs a torch.optim.Optimizer, got {type(params).__name__}, which is not derived from it"
        )
    entries = list(params)
    if not entries:
        raise ValueError("params is empty: SAM got no parameters to optimize")
    if isinstance(entries[0], dict):
        groups = [dict(group) for group in entries]
        for group in groups:
            if not isinstance(group.get("params"), (Tensor, list, set, type(None))):
                group["params"] = list(group["params"])  # whoever looks first would use an iterator up
        return groups
    return [{"params": entries}]


def name_of(param: Tensor, param_groups: Sequence[dict[str, Any]]) -> str:
    """How an error message calls a parameter: by its name where the groups have names, else by its position."""
    for index, group in enumerate(param_groups):
        for position, p in enumerate(group["params"]):
            if p is param:
                names = group.get("param_names") or []  # shorter if somebody has appended to the parameters
                numbered = f"parameter {position} of group {index}"
                return f"parameter {names[position]!r}" if position < len(names) else numbered
    return "a parameter"


def check_options(group: dict[str, Any]) -> None:
    """Raise ValueError if an option of a group is out of range."""
    for name in OPTIONS:
        if name in group and name not in FLAGS:
            check_at_least_zero(name, group[name])
        elif name in group:
            by_place = name == "adaptive" and isinstance(group[name], float)
            hint = " (the base optimizer's options go by name: lr=0.1)" if by_place else ""
            check_flag(name, group[name], f"True or False{hint}")


def make_plain(group: dict[str, Any]) -> None:
    """Check a group's options, and turn ints and NumPy's numbers into floats and bools, which pass at once next time,
    and which ``torch.load`` accepts.

    Raises:
        ValueError: as :func:`check_options`.
    """
    check_options(group)
    for name in OPTIONS:
        value: Any = group.get(name)
        # Other things that convert to a number (a tensor, an array, an object with __float__) may change their value.
        if isinstance(value, Number) or (hasattr(value, "dtype") and not hasattr(value, "__setitem__")):  # numpy's bool
            group[name] = bool(value) if name in FLAGS else float(value)


def check_at_least_zero(name: str, value: Any, wanted: str = "of at least 0") -> None:
    """Raise ValueError if the option ``name`` is not a finite number of at least 0. True does not count as one: it is
    another argument in the wrong place.
    """
    try:
        number = float(value) if not (isinstance(value, str) or _is_bool(value)) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"{name} must be a finite number {wanted}, got {value!r}")


def check_above_zero(name: str, value: Any) -> None:
    """Raise ValueError if ``value`` is not a finite number above 0."""
    check_at_least_zero(name, value, "above 0")
    if not value > 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_count(name: str, value: Any, at_least: int = 1) -> None:
    """Raise ValueError if ``value`` is not an int of at least ``at_least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an int of at least {at_least}, got {value!r}")


def check_flag(name: str, value: Any, wanted: str = "True or False") -> None:
    """Raise ValueError if ``value`` is not true or false: "False" from a configuration file would be taken for true. 0
    and 1 will do, but not 1.0, which is another argument in the wrong place.
    """
    if isinstance(value, bool):  # most often
        return
    try:
        known = (isinstance(value, Integral) or _is_bool(value)) and value in (True, False)
    except (RuntimeError, ValueError):  # of several elements
        known = False
    if not known:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _is_bool(value: Any) -> bool:
    """Whether ``value`` is True or False: Python's, NumPy's or a tensor."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def check_loss_fn(loss_fn: Any) -> None:
    """Raise TypeError if ``loss_fn`` cannot be called as ``loss_fn(model, *batch)``: it is not callable, or is one of
    torch's losses, which take no model. A subclass with a ``forward`` of its own may take one.
    """
    if not callable(loss_fn) or (
        isinstance(loss_fn, nn.modules.loss._Loss) and type(loss_fn).forward.__module__ == nn.modules.loss.__name__
    ):
        raise TypeError(
            "loss_fn must be a function of the model and the batch, such as lambda model, x, y: criterion(model(x), "
            f"y), got {type(loss_fn).__name__}"
        )


def check_base(base: Any, flatten: bool = False) -> None:
    """Raise TypeError or ValueError if ``base``, or an optimizer inside it, cannot be a base optimizer (with
    ``flatten=True``, if that is asked for).
    """
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must return a torch.optim.Optimizer, got {type(base).__name__}")
    for name in ("defaults", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if not hasattr(base, name):  # some wrappers do not call Optimizer.__init__
            setattr(base, name, OrderedDict())  # a hook's handle cannot weakly refer to a plain dict
    for optimizer in with_inner(base):
        _check_one(optimizer)
        if flatten and getattr(optimizer, "parameters_as_bucket_view", False):
            raise ValueError(
                f"{type(optimizer).__name__} with parameters_as_bucket_view=True broadcasts buffers of its own, out of "
                "which flatten=True would move the parameters: leave one of the two out"
            )


def with_inner(base: Optimizer) -> list[Optimizer]:
    """An optimizer, and the optimizers inside it if it is a wrapper such as Lookahead."""
    found = [base]
    for optimizer in found:
        for value in vars(optimizer).values():
            inner = value if isinstance(value, (list, tuple)) else (value,)
            found += [o for o in inner if isinstance(o, Optimizer) and not any(o is known for known in found)]
    return found


def _check_one(base: Optimizer) -> None:
    collisions = [name for name in OPTIONS if name in base.defaults]
    if collisions:
        raise ValueError(
            f"{type(base).__name__} has options of its own with the names of SAM's ({', '.join(collisions)}): "
            "one group entry cannot hold both, so it cannot be SAM's base optimizer"
        )
    if getattr(base, "_overlap_with_ddp", False):
        name = type(base).__name__
        raise ValueError(
            f"{name} with overlap_with_ddp=True steps in the middle of every backward pass, SAM's first as well: leave "
            "it out"
        )
    cls: Any = type(base)
    if differentiates_gradients(cls):
        raise ValueError(
            f"{cls.__name__} differentiates gradients in its step, which needs the graph of the second pass and "
            "the weights w + e that it was made with; SAM has restored w by then: it cannot be SAM's base optimizer"
        )
    if needs_closure(base.step):
        raise ValueError(
            f"{type(base).__name__}.step needs a closure to evaluate the loss again: it cannot be SAM's base optimizer"
        )


def needs_closure(function: Callable[..., Any]) -> bool:
    """Whether a function cannot be called without a closure."""
    closure = inspect.signature(function).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


@cache
def differentiates_gradients(cls: type) -> bool:
    """Whether ``cls.step``, or a function that it calls by name, calls ``torch.autograd.grad``, as optimizers that
    estimate the Hessian do. Functions that need a closure do not count, since SAM gives them none: heavyball may
    estimate the Hessian in one.
    """
    classes = cls.__mro__[: cls.__mro__.index(Optimizer)]
    pending: list[Any] = [vars(c).get("step") for c in classes]
    seen = set()
    while pending:
        function = pending.pop()
        function = inspect.unwrap(function) if callable(function) else None
        code = getattr(function, "__code__", None)
        if function is None or code is None or code in seen or needs_closure(function):
            continue
        seen.add(code)
        instructions = list(dis.get_instructions(code))
        found = [function.__globals__.get(i.argval) for i in instructions if i.opname == "LOAD_GLOBAL"]
        if ("autograd", "grad") in pairwise(i.argval for i in instructions) or any(f is autograd.grad for f in found):
            return True
        pending += [vars(c)[name] for c in classes for name in code.co_names if callable(vars(c).get(name))]
        pending += [f for f in found if inspect.isfunction(f) and f.__module__ == cls.__module__]
    return False
