"""What SAM is given: parameters, options, a base optimizer, a state dict.

Checked and brought into the form that the rest expects.
"""

from __future__ import annotations

import dis
import inspect
import math
import pkgutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from numbers import Number
from typing import Any

from torch import Tensor, autograd, nn
from torch.optim import SGD, Optimizer

OPTIONS = ("rho", "adaptive", "eta", "perturb")
"""The options that SAM adds to every parameter group."""

FLAGS = ("adaptive", "perturb")
"""Those of them that are true or false."""

OLD_WEIGHTS = "old_p"
"""Where the reference implementation keeps its backup, in the state that it saves."""


def without_old_weights(state: dict[Any, Any]) -> dict[Any, Any]:
    """The state of a reference implementation's checkpoint, without the copy of the weights in it."""
    if not any(OLD_WEIGHTS in entry for entry in state.values() if isinstance(entry, dict)):
        return state
    warnings.warn(
        "this checkpoint is the reference implementation's, which saves no state of the base optimizer: its momentum "
        "starts anew",
        UserWarning,
        stacklevel=3,
    )
    kept = {key: {name: value for name, value in entry.items() if name != OLD_WEIGHTS} for key, entry in state.items()}
    return {key: entry for key, entry in kept.items() if entry}


def make_base(params: Any, base_optimizer: Any, base_kwargs: dict[str, Any]) -> Callable[[list[dict[str, Any]]], Any]:
    """What makes the base optimizer from the parameter groups.

    Raises:
        TypeError: ``base_optimizer`` is not callable, or ``params`` is an optimizer, which leaves nothing to make.
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
    # Some, as MuonWithAuxAdam, take no entries that they do not know: the options are taken over afterwards.
    return lambda groups: found(
        [{k: v for k, v in group.items() if k not in OPTIONS} for group in groups], **base_kwargs
    )


def take_over_options(made: list[dict[str, Any]], given: list[dict[str, Any]]) -> None:
    """Give the groups that a base optimizer has made the SAM options of the groups that their parameters came in.

    Raises:
        ValueError: a group mixes parameters that came with different options.
    """
    options_of = {id(p): {name: group[name] for name in OPTIONS} for group in given for p in _tensors(group["params"])}
    for index, group in enumerate(made):
        if all(name in group for name in OPTIONS):
            continue
        found = [options_of[id(p)] for p in group["params"] if id(p) in options_of]
        if not found and len(made) == len(given):  # without parameters, or with others that the base has made of them
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
    """The parameter groups, as new dictionaries; an optimizer's own."""
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
            FutureWarning,  # as torch since 2.15, whose words it begins with
            stacklevel=3,
        )
    if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):  # some are iterables, of modules
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
                group["params"] = list(group["params"])  # an iterator would be used up by who looks first
        return groups
    return [{"params": entries}]


def name_of(param: Tensor, param_groups: Sequence[dict[str, Any]]) -> str:
    """How an error message calls a parameter: by its name where the groups have names, else by its position."""
    for index, group in enumerate(param_groups):
        for position, p in enumerate(group["params"]):
            if p is param:
                names = group.get("param_names") or []  # shorter, where somebody has appended to the parameters
                numbered = f"parameter {position} of group {index}"
                return f"parameter {names[position]!r}" if position < len(names) else numbered
    return "a parameter"


def check_arguments(perturb_eps: Any, flatten: Any, stochastic_rounding: Any) -> None:
    """Raise ValueError if an argument of the constructor is out of range."""
    check_at_least_zero("perturb_eps", perturb_eps)
    check_flag("flatten", flatten)
    if stochastic_rounding is not None:
        check_flag("stochastic_rounding", stochastic_rounding, "None, True or False")


def check_options(group: dict[str, Any]) -> None:
    """Raise ValueError if an option of a group is out of range."""
    for name, check in (("rho", check_at_least_zero), ("eta", check_at_least_zero), *((f, check_flag) for f in FLAGS)):
        if name in group:
            check(name, group[name])


def make_plain(group: dict[str, Any]) -> None:
    """Check a group's options, and turn its int and numpy's numbers into Python's own kinds, which need no second look
    and which ``torch.load`` takes from a file.

    Raises:
        ValueError: as :func:`check_options`.
    """
    check_options(group)
    for name in OPTIONS:
        value: Any = group.get(name)
        # What else can be taken for a number, as a tensor, an array or an object with __float__, may change its value.
        if isinstance(value, Number) or (hasattr(value, "dtype") and not hasattr(value, "__setitem__")):  # numpy's bool
            group[name] = bool(value) if name in FLAGS else float(value)


def check_at_least_zero(name: str, value: Any, wanted: str = "of at least 0") -> None:
    """Raise ValueError if the option ``name`` is not a finite number of at least 0. True is not one: it is another
    argument in the wrong place.
    """
    try:
        number = float(value) if not isinstance(value, str | bool) else math.nan
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
    """Raise ValueError if ``value`` is not true or false: "False" from a configuration file would be taken for true."""
    try:
        known = value in (True, False)
    except (RuntimeError, ValueError):  # of several elements
        known = False
    if not known:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_loss_fn(loss_fn: Any) -> None:
    """Raise TypeError if ``loss_fn`` cannot be called as ``loss_fn(model, *batch)``, or is a loss of torch's, which
    takes no model. One derived from it, with a ``forward`` of its own, may.
    """
    if not callable(loss_fn) or (
        isinstance(loss_fn, nn.modules.loss._Loss) and type(loss_fn).forward.__module__ == nn.modules.loss.__name__
    ):
        raise TypeError(
            "loss_fn must be a function of the model and the batch, such as lambda model, x, y: criterion(model(x), "
            f"y), got {type(loss_fn).__name__}"
        )


def check_base(base: Any, flatten: bool = False) -> None:
    """Raise TypeError or ValueError if ``base``, or an optimizer in it, cannot be a base optimizer, or not with
    ``flatten=True``.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must return a torch.optim.Optimizer, got {type(base).__name__}")
    for name in ("defaults", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if not hasattr(base, name):  # some that wrap another one do without Optimizer.__init__
            setattr(base, name, OrderedDict())  # to which, unlike a dict, the handle of a hook can refer
    for optimizer in and_inner(base):
        _check_one(optimizer)
        if flatten and getattr(optimizer, "parameters_as_bucket_view", False):
            raise ValueError(
                f"{type(optimizer).__name__} with parameters_as_bucket_view=True broadcasts buffers of its own, out of "
                "which flatten=True would move the parameters: leave one of the two out"
            )


def and_inner(base: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it wraps, as Lookahead does."""
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
    if differentiates_gradients(type(base)):
        raise ValueError(
            f"{type(base).__name__} differentiates gradients in its step, which needs the graph of the second pass and "
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


def differentiates_gradients(cls: type) -> bool:
    """Whether ``cls.step``, or what it calls by name, calls ``torch.autograd.grad``, as optimizers do that estimate the
    Hessian. What cannot do without a closure, which SAM does not give, does not count: heavyball's may estimate it.
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
