"""Constructor and group options: every bad value is refused by its name, and a refused group leaves no trace."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import make_params, same_bits, values
from torch import nn

from sam_fast import SAM, backends

BAD_NUMBERS = [-0.1, float("nan"), float("inf")]
NOT_NUMBERS = [None, "0.1", 1j, True, np.True_, torch.tensor(True), pytest.param(10**400, id="huge")]


@pytest.mark.parametrize("option", ["rho", "eta", "perturb_eps"])
@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_a_number_out_of_range_is_a_value_error_that_names_the_option(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        SAM(make_params([3]), lr=0.1, **{option: value})


@pytest.mark.parametrize("option", ["rho", "eta", "perturb_eps"])
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=str)
def test_what_is_no_number_is_an_error_that_names_the_option(option: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=option):
        SAM(make_params([3]), lr=0.1, **{option: value})


@pytest.mark.parametrize("option", ["rho", "eta"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize("how", ["constructor", "add_param_group"])
def test_a_bad_option_of_a_group_is_refused(option: str, value: float, how: str) -> None:
    group = {"params": make_params([3]), option: value}
    optimizer = SAM(make_params([4]), lr=0.1)
    with pytest.raises(ValueError, match=option):
        SAM([group], lr=0.1) if how == "constructor" else optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("option", ["adaptive", "perturb", "flatten"])
@pytest.mark.parametrize("value", ["False", "no", None, 2, 0.5, 1.0, torch.ones(2), np.ones(2)], ids=repr)
def test_what_is_neither_true_nor_false_is_refused(option: str, value: Any) -> None:
    """A string from a configuration file was true, whatever it said."""
    group = {"params": make_params([3]), option: value}
    optimizer = SAM(make_params([4]), lr=0.1)
    with pytest.raises(ValueError, match=f"{option} must be True or False"):
        SAM([group], lr=0.1) if option == "perturb" else SAM(make_params([3]), lr=0.1, **{option: value})
    if option != "flatten":
        with pytest.raises(ValueError, match=f"{option} must be True or False"):
            optimizer.add_param_group(group)
        state_dict = optimizer.state_dict()
        state_dict["param_groups"][0][option] = value
        with pytest.raises(ValueError, match=f"{option} must be True or False"):
            optimizer.load_state_dict(state_dict)


BAD = [("rho", "0.1"), ("rho", None), ("rho", True), ("eta", "0.1"), ("adaptive", "False"), ("perturb", "False")]


@pytest.mark.parametrize(("option", "value"), BAD)
def test_what_somebody_has_put_into_a_group_is_refused_by_the_step(option: str, value: Any) -> None:
    """Such as a schedule of rho that reads a configuration file."""
    params = make_params([3])
    optimizer = SAM(params, lr=0.1)
    optimizer.param_groups[0][option] = value
    params[0].grad, before = torch.ones(3), values(params)
    with pytest.raises(ValueError, match=f"{option} must be"):
        optimizer.first_step()
    assert same_bits(before, values(params))
    optimizer.param_groups[0][option] = SAM(make_params([3]), lr=0.1).param_groups[0][option]
    optimizer.first_step()
    assert optimizer.perturbed


@pytest.mark.parametrize("true", [1, np.int64(1), np.True_, torch.tensor(True)])
def test_other_kinds_of_true_are_true(true: Any) -> None:
    p = make_params([3])[0]
    assert SAM([p], lr=0.1, adaptive=true, flatten=true).param_groups[0]["adaptive"] == 1


def test_a_model_in_the_place_of_its_parameters_is_an_error() -> None:
    for model in (nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))):
        with pytest.raises(TypeError, match=r"params must be parameters, got a model, .*: pass model\.parameters\(\)"):
            SAM(model, lr=0.1)
    params = nn.ParameterList(make_params([3, 4]))  # a model, too
    assert SAM(params, lr=0.1).param_groups[0]["params"] == list(params)


def test_a_wrapper_that_is_no_optimizer_is_an_error() -> None:
    class Wrapper:
        """As schedulefree's."""

        param_groups = ({"params": [torch.zeros(3, requires_grad=True)]},)

    with pytest.raises(TypeError, match=r"needs a torch\.optim\.Optimizer, got Wrapper"):
        SAM(Wrapper())  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_a_learning_rate_in_the_place_of_adaptive_is_an_error(rate: Any) -> None:
    with pytest.raises(ValueError, match=rf"adaptive must be .*the base optimizer's options go by name.* got {rate}"):
        SAM(make_params([3]), torch.optim.SGD, 0.05, rate)


@pytest.mark.parametrize(
    ("name", "place"), [("rho", "an option of the parameter groups"), ("schedule", "an argument of the constructor")]
)
def test_an_option_is_no_attribute_and_setting_it_says_so(name: str, place: str) -> None:
    """It had no effect, in silence."""

    class Variant(SAM):
        """Has one for its own use."""

    optimizer = SAM(make_params([3]), lr=0.1)
    with pytest.raises(AttributeError, match=rf"setting optimizer\.{name} has no effect: it is {place}"):
        setattr(optimizer, name, 0.3)
    with pytest.raises(AttributeError, match=f"it is {place}"):
        getattr(optimizer, name)
    variant = Variant(make_params([3]), lr=0.1)
    setattr(variant, name, 0.3)
    assert getattr(variant, name) == 0.3


def test_a_private_method_of_the_base_optimizer_is_pointed_to() -> None:
    """Such as Adafactor's ``_get_lr``, which the AdafactorSchedule of Transformers calls."""

    class Base(torch.optim.SGD):
        def _get_lr(self) -> None: ...

    optimizer = SAM(make_params([3]), Base, lr=0.1)
    with pytest.raises(AttributeError, match=r"private to the base optimizer, optimizer\.base_optimizer\._get_lr"):
        optimizer._get_lr()
    with pytest.raises(AttributeError, match=r"no attribute '_other'$"):
        optimizer._other()


def test_whether_there_is_a_private_attribute_is_asked_without_reading_the_base_optimizers() -> None:
    """``hasattr`` raised what a property of the base optimizer raises."""

    class Base(torch.optim.SGD):
        @property
        def _unready(self) -> None:
            raise RuntimeError("there was no step yet")

    optimizer = SAM(make_params([3]), Base, lr=0.1)
    optimizer.base_optimizer._mine = None  # type: ignore[attr-defined]
    assert not hasattr(optimizer, "_unready")
    for name in ("_unready", "_mine"):
        with pytest.raises(AttributeError, match=rf"optimizer\.base_optimizer\.{name}"):
            getattr(optimizer, name)
    optimizer.base_optimizer = None  # type: ignore[assignment]  # as code that tears things down may
    assert not hasattr(optimizer, "_unready")


def test_an_optimizer_instance_as_base_is_refused_by_name() -> None:
    params = make_params([3])
    with pytest.raises(TypeError, match=r"base_optimizer.*class.*, got an existing SGD: pass it in place of params"):
        SAM(params, torch.optim.SGD(params, lr=0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("through", ["the optimizer", "a checkpoint"])
def test_arguments_without_effect_around_the_optimizer_of_an_earlier_sam_are_told(through: str) -> None:
    """A cell of a notebook that is run again with another rho."""
    params = make_params([3])
    base = torch.optim.SGD(params, lr=0.1)
    earlier = SAM(base, rho=0.3)
    if through == "a checkpoint":
        base = torch.optim.SGD(params, lr=0.1)
        base.load_state_dict(earlier.state_dict())
    with pytest.warns(RuntimeWarning, match=r"keep rho=0\.3, adaptive=False, not rho=0\.5, adaptive=True"):
        SAM(base, rho=0.5, adaptive=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SAM(base, rho=0.3).param_groups[0]["rho"] == 0.3
        SAM(earlier.param_groups, rho=0.5, lr=0.1)  # as with any option of a group
        SAM(torch.optim.SGD([{"params": make_params([3]), "rho": 0.3}], lr=0.1), rho=0.5)


def test_sam_inside_sam_is_refused() -> None:
    with pytest.raises(ValueError, match="rho"):
        SAM(make_params([3]), SAM, lr=0.1)


@pytest.mark.parametrize("groups", [1, 2])
def test_lbfgs_is_refused_with_any_number_of_groups(groups: int) -> None:
    with pytest.raises(ValueError, match="LBFGS"):
        SAM([{"params": make_params([3])} for _ in range(groups)], torch.optim.LBFGS, lr=0.1)


def test_a_partial_is_a_base_optimizer() -> None:
    optimizer = SAM(make_params([3]), functools.partial(torch.optim.SGD, momentum=0.8), lr=0.1)
    assert optimizer.param_groups[0]["momentum"] == 0.8


@pytest.mark.parametrize("variant", ["foreach", "fused"])
def test_the_variant_asked_for_reaches_the_base_optimizer(variant: str) -> None:
    assert SAM(make_params([3]), lr=0.1, **{variant: True}).base_optimizer.defaults[variant] is True


def test_base_defaults_are_among_the_optimizers_own() -> None:
    """OneCycleLR and others look there for what they can cycle."""
    optimizer = SAM(make_params([3]), torch.optim.AdamW, lr=0.1, rho=0.3)
    assert optimizer.base_optimizer.defaults.items() <= optimizer.defaults.items()
    assert optimizer.defaults["rho"] == 0.3


def test_each_group_has_the_options_it_was_given() -> None:
    own = {"rho": 0.3, "adaptive": True, "eta": 0.2, "perturb": False, "lr": 0.5}
    optimizer = SAM([{"params": make_params([3]), **own}, {"params": make_params([4])}], lr=0.1)
    assert own.items() <= optimizer.param_groups[0].items()
    others = {"rho": 0.05, "adaptive": False, "eta": 0.0, "perturb": True, "lr": 0.1}
    assert others.items() <= optimizer.param_groups[1].items()


@pytest.mark.parametrize("how", ["tensor", "list", "generator"])
def test_a_groups_parameters_may_be_a_tensor_or_any_iterable(how: str, flatten: bool) -> None:
    p = make_params([3])[0]
    given = {"tensor": lambda: p, "list": lambda: [p], "generator": lambda: (q for q in [p])}[how]()
    optimizer = SAM([{"params": given}], lr=0.1, flatten=flatten)
    assert optimizer.param_groups[0]["params"] == [p]
    before = values([p])
    optimizer.first_step()
    assert not same_bits(values([p]), before)


def test_a_set_of_parameters_has_an_order_of_its_own_in_each_run() -> None:
    with pytest.warns(FutureWarning, match="Pass a list"):  # torch's own warning since 2.15
        SAM(set(make_params([3, 4])), lr=0.1)


def test_a_group_without_parameters_takes_no_part(backend: str, flatten: bool) -> None:
    params = make_params([3])
    optimizer = SAM([{"params": []}, {"params": params}], lr=0.1, backend=backend, flatten=flatten)
    optimizer.first_step()
    assert float(optimizer.grad_norm) == pytest.approx(float(params[0].grad.double().norm()), rel=1e-6)  # type: ignore[union-attr]
    optimizer.second_step()


# ---- A refused group leaves no trace ---------------------------------------------------------------------------------


def test_a_group_that_the_forced_backend_does_not_take_is_not_added() -> None:
    if "cpu" not in backends.available():
        pytest.skip("the torch backend takes every dtype")
    optimizer = SAM(make_params([3]), lr=0.1, backend="cpu")
    with pytest.raises(ValueError, match="complex64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1
    optimizer.first_step()
    optimizer.second_step()


def test_flatten_refuses_an_added_parameter_that_shares_memory() -> None:
    """Moved into a flat buffer it would no longer be tied; the constructor refuses such parameters too."""
    tied = make_params([10])[0]
    optimizer = SAM([tied], lr=0.1, flatten=True)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": [nn.Parameter(tied.data)]})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_that_is_in_another_group_is_refused_and_nothing_changes(flatten: bool) -> None:
    params = make_params([10, 20])
    optimizer = SAM(params, lr=0.1, flatten=flatten)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [*make_params([5]), params[0]]})
    assert len(optimizer.param_groups) == 1
    before = values(params)
    optimizer.first_step()
    optimizer.restore()
    assert same_bits(values(params), before)


# ---- Groups that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holds", [list, tuple])
def test_a_parameter_exchanged_in_its_group_takes_part(holds: type, backend: str, flatten: bool) -> None:
    old, stays = make_params([10, 20])
    new = make_params([30], seed=1)[0]
    optimizer = SAM([old, stays], lr=0.0, rho=0.1, backend=backend, flatten=flatten)
    optimizer.first_step()
    optimizer.second_step()
    optimizer.param_groups[0]["params"][0] = new
    if holds is tuple:
        optimizer.param_groups[0]["params"] = (new, stays)
    before = values([new, stays, old])
    optimizer.first_step()
    moved = [not same_bits([p], [q]) for p, q in zip([new, stays, old], before, strict=True)]
    assert moved == [True, True, False]
    optimizer.second_step()
    assert same_bits(values([new, stays, old]), before)


@pytest.mark.parametrize("change", ["rho", "perturb", "params"])
def test_options_changed_between_the_passes_do_not_keep_the_weights_from_coming_back(
    change: str, backend: str, flatten: bool
) -> None:
    params = make_params([10, 20])
    optimizer = SAM([{"params": params[:1]}, {"params": params[1:]}], lr=0.0, backend=backend, flatten=flatten)
    before = values(params)
    optimizer.first_step()
    optimizer.param_groups[1][change] = {"rho": 9.0, "perturb": False, "params": []}[change]
    optimizer.second_step()
    assert same_bits(values(params), before)


def test_maximize_in_one_group_turns_only_that_groups_perturbation(backend: str, flatten: bool) -> None:
    params = make_params([10, 20])
    optimizer = SAM(
        [{"params": params[:1]}, {"params": params[1:], "maximize": True}], lr=0.0, backend=backend, flatten=flatten
    )
    before = values(params)
    optimizer.first_step()
    along = [float(((p.detach() - q) * p.grad).sum()) for p, q in zip(params, before, strict=True)]
    assert along[0] > 0 > along[1]


class Follows:
    """A number that somebody changes."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return self.value

    def __imul__(self, other: float) -> Follows:
        self.value *= other
        return self


@pytest.mark.parametrize("rho", [torch.tensor(0.5), np.array(0.5), Follows(0.5)], ids=["tensor", "array", "object"])
def test_numbers_of_other_kinds_become_pythons_and_what_may_change_stays(rho: Any) -> None:
    """They were looked at again in every step."""
    params = make_params([3])
    options = {"rho": np.float32(2), "eta": 0, "adaptive": np.bool_(True), "perturb": 1}
    optimizer = SAM([{"params": params[:1], **options}, {"params": make_params([4]), "rho": rho}], lr=0.1)
    optimizer.first_step()
    group, other = optimizer.param_groups
    assert [(type(group[name]), group[name]) for name in options] == [
        (float, 2.0),
        (float, 0.0),
        (bool, True),
        (bool, True),
    ]
    assert other["rho"] is rho
    optimizer.restore()
    before = values(other["params"])
    rho *= 0
    optimizer.first_step()
    assert same_bits(before, other["params"])
