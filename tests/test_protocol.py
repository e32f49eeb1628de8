"""SAM as a torch optimizer: constructor, groups, state, schedulers, hooks, misuse."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from cases import SmallNet, make_params, same_bits, values
from torch import nn
from torch.optim import lr_scheduler

from sam_fast import SAM


def two_calls(params, optimizer) -> None:
    """One step of SAM with made-up gradients."""
    for call in (optimizer.first_step, optimizer.second_step):
        for p in params:
            p.grad = torch.ones_like(p)
        call(zero_grad=True)


# ---- Constructor and groups ------------------------------------------------------------------------------------------


def test_signature_is_the_contract():
    optimizer = SAM(make_params([3]), lr=0.1)
    assert type(optimizer.base_optimizer) is torch.optim.SGD
    group = optimizer.param_groups[0]
    assert (group["rho"], group["adaptive"], group["eta"], group["perturb"], group["lr"]) == (
        0.05,
        False,
        0.0,
        True,
        0.1,
    )
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.guarantee(id="torch-errors")
@pytest.mark.guarantee(id="colliding-names")
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rho": -0.1}, ValueError, "rho"),
        ({"rho": float("nan")}, ValueError, "rho"),
        ({"eta": -1.0}, ValueError, "eta"),
        ({"perturb_eps": -1e-3}, ValueError, "perturb_eps"),
        ({"base_optimizer": 3}, TypeError, "base_optimizer"),
        ({"base_optimizer": "SGD"}, ValueError, "base_optimizer.*torch.optim.SGD"),
        ({"base_optimizer": "torch.optim.Nothing"}, ValueError, "base_optimizer.*Nothing"),
        ({"closure": "first"}, ValueError, "closure.*both"),
        ({"params": torch.optim.SGD([nn.Parameter(torch.zeros(2))])}, TypeError, "lr"),
        ({"base_optimizer": lambda groups, **_: None}, TypeError, "base_optimizer"),
        ({"base_optimizer": torch.optim.Adadelta}, ValueError, "rho"),
        ({"base_optimizer": torch.optim.LBFGS}, ValueError, "closure|parameter groups|support"),
        ({"params": []}, ValueError, "empty"),
        ({"params": torch.zeros(3)}, TypeError, "tensor"),
        ({"params": [{"params": [nn.Parameter(torch.zeros(2))], "rho": -1.0}]}, ValueError, "rho"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        SAM(**{"params": make_params([3]), "lr": 0.1, **arguments})


@pytest.mark.guarantee(id="colliding-names")
def test_kwargs_go_to_the_base_optimizer():
    optimizer = SAM(make_params([3]), torch.optim.AdamW, lr=0.1, eps=1e-6, betas=(0.8, 0.9))
    assert optimizer.param_groups[0]["eps"] == 1e-6
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_base_optimizer_may_be_a_callable():
    optimizer = SAM(make_params([3]), lambda groups, lr: torch.optim.AdamW(groups, lr=lr, weight_decay=0.5), lr=0.3)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_generators_and_named_parameters():
    model = SmallNet()
    assert len(SAM((p for p in model.parameters()), lr=0.1).param_groups[0]["params"]) == len(list(model.parameters()))
    named = SAM(model.named_parameters(), lr=0.1)
    assert named.param_groups[0]["param_names"][0] == "features.0.weight"
    two_calls(list(model.parameters()), named)


def test_the_callers_groups_are_not_changed():
    groups = [{"params": make_params([3]), "rho": 0.5}]
    SAM(groups, lr=0.1)
    assert set(groups[0]) == {"params", "rho"}


def test_repr_shows_the_base_optimizer_and_the_options():
    text = repr(SAM(make_params([3]), torch.optim.AdamW, lr=0.1))
    assert text.startswith("SAM around AdamW (\nParameter Group 0\n")
    assert "rho: 0.05" in text


# ---- One state -------------------------------------------------------------------------------------------------------


def assert_one(optimizer: SAM) -> None:
    assert optimizer.state is optimizer.base_optimizer.state
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups


@pytest.mark.guarantee(id="one-state")
def test_state_and_groups_are_the_base_optimizers_at_all_times(flatten):
    params = make_params([3, 4])
    optimizer = SAM(params, lr=0.1, momentum=0.9, flatten=flatten)
    assert_one(optimizer)
    two_calls(params, optimizer)
    assert_one(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_one(optimizer)
    optimizer.add_param_group({"params": make_params([5])})
    assert_one(optimizer)
    for twin in (copy.deepcopy(optimizer), copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert_one(twin)
        assert twin.param_groups[0]["momentum"] == 0.9
        assert twin.defaults == optimizer.defaults


@pytest.mark.guarantee(id="state-dict")
def test_state_dict_is_the_base_optimizers_own_and_holds_no_weights():
    params = make_params([300, 40])
    optimizer = SAM(params, torch.optim.AdamW, lr=0.1)
    two_calls(params, optimizer)
    mine, its = optimizer.state_dict(), optimizer.base_optimizer.state_dict()
    assert mine["param_groups"] == its["param_groups"]
    assert set(mine["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    assert buffer.tell() < 2 * 4 * 340 + 6000  # two moments; a copy of the weights would be another 1360 bytes per copy
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))


def test_groups_loaded_without_sams_options_get_the_constructors():
    params = make_params([3])
    plain = torch.optim.SGD(params, lr=0.5)
    optimizer = SAM(params, lr=0.1, rho=0.7, adaptive=True, eta=0.2)
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.param_groups[0]
    assert (group["rho"], group["adaptive"], group["eta"], group["perturb"], group["lr"]) == (0.7, True, 0.2, True, 0.5)


def test_added_group_gets_the_defaults_and_takes_part():
    params = make_params([3, 4])
    optimizer = SAM(params[:1], lr=0.1, rho=0.7, momentum=0.9)
    optimizer.add_param_group({"params": params[1:], "lr": 0.01})
    group = optimizer.param_groups[1]
    assert (group["rho"], group["momentum"], group["lr"]) == (0.7, 0.9, 0.01)
    before = values(params)
    optimizer.first_step()
    assert not torch.equal(params[1], before[1])
    with pytest.raises(ValueError, match="rho"):
        SAM(make_params([3]), lr=0.1).add_param_group({"params": make_params([2]), "rho": -1})


# ---- Schedulers, hooks, profiler -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 2),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=6),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [2]),
    ],
    ids=["step", "cosine", "one-cycle", "cyclic", "plateau", "sequential"],
)
def test_schedulers_move_the_base_optimizers_learning_rate_without_a_warning(make):
    params, plain_params = make_params([3]), make_params([3])
    optimizer = SAM(params, lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(plain_params, lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*EPOCH_DEPRECATION|.*epoch parameter.*")
        scheduler, expected = make(optimizer), make(plain)
        for _ in range(5):
            two_calls(params, optimizer)
            plain_params[0].grad = torch.ones(3)
            plain.step()
            for s in (scheduler, expected):
                s.step(*[1.0] if isinstance(s, lr_scheduler.ReduceLROnPlateau) else [])
            for name in ("lr", "momentum"):
                assert optimizer.base_optimizer.param_groups[0][name] == plain.param_groups[0][name]


@pytest.mark.guarantee(id="hooks")
def test_step_hooks_run_once_per_step_in_every_style():
    params = make_params([3])
    optimizer, seen = SAM(params, lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    two_calls(params, optimizer)
    assert seen == ["pre", "post"]
    optimizer.step(lambda: params[0].sum().backward())
    assert seen == ["pre", "post"] * 2


def test_the_profiler_sees_the_step():
    params = make_params([3])
    optimizer = SAM(params, lr=0.1)
    with torch.profiler.profile() as profile:
        two_calls(params, optimizer)
    assert "Optimizer.step#SAM.step" in {event.key for event in profile.key_averages()}


# ---- Misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="misuse")
@pytest.mark.parametrize(
    ("perturbed", "call", "words"),
    [
        (True, lambda o, m: o.first_step(), "second_step.*restore"),
        (False, lambda o, m: o.second_step(), "first_step"),
        (False, lambda o, m: o.step(), "first_step"),
        (False, lambda o, m: o.step(lambda: None, passes="second") if o.zero_grad() is None else None, "backward"),
        (True, lambda o, m: o.load_state_dict(o.state_dict()), "restore"),
        (True, lambda o, m: o.add_param_group({"params": make_params([2])}), "restore"),
        (True, lambda o, m: copy.deepcopy(o), "restore"),
        (True, lambda o, m: pickle.dumps(o), "restore"),
        (True, lambda o, m: o.first_pass(m).__enter__(), "restore"),
        (False, lambda o, m: o.second_pass(m).__enter__(), "first_step"),
        (False, lambda o, m: o.grad_norm, "first_step"),
    ],
    ids=[
        "first-twice",
        "second-first",
        "step-first",
        "closure",
        "load",
        "add-group",
        "deepcopy",
        "pickle",
        "first_pass",
        "second_pass",
        "grad_norm",
    ],
)
def test_misuse_says_what_to_do_and_changes_nothing(perturbed, call, words):
    model = nn.Linear(3, 2)
    optimizer = SAM(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    start = values(list(model.parameters()))
    if perturbed:
        optimizer.first_step()
    before = values(list(model.parameters()))
    with pytest.raises(RuntimeError, match=words):
        call(optimizer, model)
    assert same_bits(values(list(model.parameters())), before)
    assert optimizer.perturbed is perturbed
    optimizer.restore()
    assert same_bits(values(list(model.parameters())), start)


def test_grad_norm_is_a_copy():
    params = make_params([3])
    optimizer = SAM(params, lr=0.1)
    two_calls(params, optimizer)
    norm = optimizer.grad_norm
    assert norm.dim() == 0
    kept = float(norm)
    params[0].grad = torch.full((3,), 100.0)
    optimizer.first_step()
    assert float(norm) == kept
    assert float(optimizer.grad_norm) != kept
