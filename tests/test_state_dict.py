"""Checkpoints and copies: the base optimizer's format, the same bits afterwards, and nothing half loaded."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import give, make_params, normal, same_bits, same_step, values
from torch import Tensor, nn
from torch.optim import lr_scheduler

from sam_fast import SAM

Step = Callable[[list[nn.Parameter], torch.optim.Optimizer, int], None]


def sam_steps(params: list[nn.Parameter], optimizer: SAM, steps: range) -> None:
    """Steps of SAM whose second gradient depends on the perturbed weights, so that a wrong e shows."""
    for i in steps:
        give(params, i)
        optimizer.first_step(zero_grad=True)
        give(params, 1000 + i)
        for p in params:
            p.grad.add_(p.detach(), alpha=0.1)  # type: ignore[union-attr]
        optimizer.second_step(zero_grad=True)


def plain_steps(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        give(params, i)
        optimizer.step()


def through_file(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.save(state, folder / "state.pt")
    loaded: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    return loaded


def optimizers_with_variants() -> list[Any]:
    """Every torch.optim class that SAM takes, in all its variants."""
    found = []
    for name, cls in sorted(vars(torch.optim).items()):
        if (
            inspect.isclass(cls)
            and issubclass(cls, torch.optim.Optimizer)
            and name not in ("Optimizer", "SparseAdam", "LBFGS", "Adadelta")
        ):
            variants = [flag for flag in ("foreach", "fused") if flag in inspect.signature(cls).parameters]
            found += [
                pytest.param(cls, {flag: True} if flag else {}, id=f"{name}-{flag}" if flag else name)
                for flag in ("", *variants)
            ]
    return found


# ---- The base optimizer's format -------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="state-dict")
@pytest.mark.parametrize(("base", "variant"), optimizers_with_variants())
def test_a_run_resumed_from_a_file_goes_on_with_the_same_bits(
    base: Any, variant: dict[str, bool], flatten: bool, tmp_path: Path
) -> None:
    sizes = [(4, 3), (3, 5)] if base.__name__ == "Muon" else [(4, 3), (5,), ()]

    def start() -> tuple[list[nn.Parameter], SAM]:
        generator = torch.Generator().manual_seed(2)
        params = [nn.Parameter(normal(size, generator)) for size in sizes]
        return params, SAM(params, base, lr=0.01, flatten=flatten, **variant)

    params, optimizer = start()
    try:
        sam_steps(params, optimizer, range(3))
    except RuntimeError as error:
        if not variant:
            raise
        pytest.skip(f"{base.__name__} has no such variant here: {error}")
    weights, saved = values(params), through_file(optimizer.state_dict(), tmp_path)
    sam_steps(params, optimizer, range(3, 6))

    others, resumed = start()
    for p, w in zip(others, weights, strict=True):
        p.data.copy_(w)
    resumed.load_state_dict(saved)
    sam_steps(others, resumed, range(3, 6))
    assert same_bits(others, params)


@pytest.mark.guarantee(id="older-state-dicts")
@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True})],
    ids=["sgd", "adamw"],
)
def test_a_plain_run_that_passes_through_sam_ends_where_it_would_have(
    base: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    """Plain optimizer -> SAM (three steps in a group with rho=0, which are plain steps) -> plain optimizer, each
    time through a file.
    """
    params, twins = make_params([30, 7]), make_params([30, 7])
    never_stopped = base(params, **options)
    plain_steps(params, never_stopped, range(9))

    first = base(twins, **options)
    plain_steps(twins, first, range(3))
    middle = SAM(twins, base, rho=0.0, **options)
    middle.load_state_dict(through_file(first.state_dict(), tmp_path))
    for i in range(3, 6):
        give(twins, i)
        middle.first_step()
        middle.second_step()
    last = base(twins, **options)
    last.load_state_dict(through_file(middle.state_dict(), tmp_path))
    plain_steps(twins, last, range(6, 9))
    assert same_step(base, twins, params)


def test_loading_a_state_dict_does_not_change_it() -> None:
    params = make_params([3])
    state = torch.optim.SGD(params, lr=0.5).state_dict()
    kept = copy.deepcopy(state)
    SAM(params, lr=0.1).load_state_dict(state)
    assert state == kept


def test_a_state_dict_does_not_follow_the_optimizers_options() -> None:
    optimizer = SAM(make_params([3]), lr=0.1)
    state = optimizer.state_dict()
    optimizer.param_groups[0]["rho"] = 9.0
    assert state["param_groups"][0]["rho"] == 0.05


def test_options_of_each_group_survive_a_file(tmp_path: Path) -> None:
    own: dict[str, Any] = {"rho": 0.3, "adaptive": True, "eta": 0.2, "perturb": False}
    params = make_params([3, 4])
    saved = through_file(SAM([{"params": params[:1], **own}, {"params": params[1:]}], lr=0.1).state_dict(), tmp_path)
    other = SAM([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, rho=0.7)
    other.load_state_dict(saved)
    assert own.items() <= other.param_groups[0].items()
    assert other.param_groups[1]["rho"] == 0.05


@pytest.mark.guarantee(id="older-state-dicts")
@pytest.mark.parametrize("through", ["sam", "base"])
@pytest.mark.parametrize("flatten", [False, True])
def test_groups_take_the_options_they_were_made_with_when_a_plain_state_dict_has_none(
    through: str, flatten: bool
) -> None:
    own: dict[str, Any] = {"rho": 0.3, "adaptive": True, "eta": 0.2, "perturb": False}
    params = make_params([3, 4])
    optimizer = SAM([{"params": params[:1]}, {"params": params[1:], **own}], lr=0.1, rho=0.7, flatten=flatten)
    plain = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.5)
    optimizer = copy.deepcopy(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(2):
        optimizer.param_groups[0]["rho"] = optimizer.param_groups[1]["rho"] = 0.9
        (optimizer if through == "sam" else optimizer.base_optimizer).load_state_dict(plain.state_dict())
        give(params, 1)
        before = values(params)
        optimizer.first_step()
        assert own.items() <= optimizer.param_groups[1].items()
        assert [group["rho"] for group in optimizer.param_groups] == [0.7, 0.3]
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
        assert not same_bits(params[:1], before[:1])
        assert same_bits(params[1:], before[1:])
        optimizer.restore()


def test_a_group_may_follow_one_that_was_added_to_the_base_optimizer() -> None:
    params = make_params([3, 4, 5])
    optimizer = SAM(params[:1], lr=0.1, rho=0.1)
    optimizer.base_optimizer.add_param_group({"params": params[1:2]})
    optimizer.add_param_group({"params": params[2:], "rho": 0.7})
    assert [group["rho"] for group in optimizer.param_groups] == [0.1, 0.1, 0.7]
    optimizer.load_state_dict(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1).state_dict())
    assert [group["rho"] for group in optimizer.param_groups] == [0.1, 0.1, 0.7]


@pytest.mark.guarantee(id="state-dict")
def test_numpys_numbers_among_the_options_load_with_weights_only(tmp_path: Path) -> None:
    """A warm-up of rho by numpy sets them, most often right before a checkpoint is saved."""
    params = make_params([3])
    optimizer = SAM(params, lr=0.1, rho=np.float64(0.3), adaptive=np.bool_(True))
    assert through_file(optimizer.state_dict(), tmp_path)["param_groups"][0]["rho"] == 0.3
    sam_steps(params, optimizer, range(1))
    optimizer.param_groups[0]["rho"] = np.interp(0.5, [0.0, 1.0], [0.0, 0.5])
    assert through_file(optimizer.state_dict(), tmp_path)["param_groups"][0]["rho"] == 0.25


def test_named_parameters_keep_their_names_in_a_state_dict() -> None:
    model = nn.Linear(3, 2)
    optimizer = SAM(model.named_parameters(), lr=0.1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    SAM(model.named_parameters(), lr=0.1).load_state_dict(optimizer.state_dict())


def test_a_run_with_cycled_momentum_resumes_with_the_same_bits(flatten: bool, tmp_path: Path) -> None:
    """OneCycleLR writes lr and momentum into the groups of which optimizer and base optimizer must have the same."""

    def start() -> tuple[list[nn.Parameter], SAM, lr_scheduler.OneCycleLR]:
        params = make_params([30, 7, 5])
        groups = [{"params": params[:1], "rho": 0.3}, {"params": params[1:], "adaptive": True}]
        optimizer = SAM(groups, lr=0.1, momentum=0.9, nesterov=True, flatten=flatten)
        return params, optimizer, lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=8)

    params, optimizer, scheduler = start()
    saved: dict[str, Any] = {}
    for i in range(7):
        if i == 3:
            saved = through_file(
                {"w": values(params), "o": optimizer.state_dict(), "s": scheduler.state_dict()}, tmp_path
            )
        sam_steps(params, optimizer, range(i, i + 1))
        scheduler.step()

    others, resumed, its_scheduler = start()
    for p, w in zip(others, saved["w"], strict=True):
        p.data.copy_(w)
    resumed.load_state_dict(saved["o"])
    its_scheduler.load_state_dict(saved["s"])
    for i in range(3, 7):
        sam_steps(others, resumed, range(i, i + 1))
        its_scheduler.step()
    assert same_bits(others, params)
    assert resumed.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"] != 0.9


# ---- What cannot be loaded -------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="wrong-state-dict")
def test_a_state_dict_that_does_not_fit_changes_nothing(flatten: bool) -> None:
    params = make_params([3, 4])
    optimizer = SAM(params, lr=0.1, momentum=0.9, flatten=flatten)
    sam_steps(params, optimizer, range(2))
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(SAM(make_params([3]), lr=0.7).state_dict())
    assert optimizer.state is optimizer.base_optimizer.state
    assert optimizer.state_dict()["param_groups"] == kept["param_groups"]
    assert torch.equal(optimizer.state[params[1]]["momentum_buffer"], kept["state"][1]["momentum_buffer"])


def test_a_state_dict_with_a_bad_option_changes_nothing() -> None:
    optimizer = SAM(make_params([3]), lr=0.1)
    state = optimizer.state_dict()
    state["param_groups"][0] |= {"rho": -1.0, "lr": 7.0}
    with pytest.raises(ValueError, match="rho"):
        optimizer.load_state_dict(state)
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["lr"]) == (0.05, 0.1)


@pytest.mark.guarantee(id="older-state-dicts")
@pytest.mark.parametrize("kept", ["old_p", "e_w"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_a_checkpoint_of_the_reference_implementation_loads_without_its_copy_of_the_weights(
    base: Any, kept: str
) -> None:
    """Its state dict holds {"old_p": weights} per parameter, older versions' {"e_w": e}, and nothing of the base
    optimizer.
    """
    params = make_params([3])
    optimizer = SAM(params, base, lr=0.1)
    state = optimizer.state_dict()
    state["state"] = {0: {kept: torch.zeros(3)}}
    with pytest.warns(UserWarning, match="saves no state of the base optimizer"):
        optimizer.load_state_dict(state)
    sam_steps(params, optimizer, range(1))
    assert kept not in optimizer.state_dict()["state"].get(0, {})


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("first", ["base", "sam"])
def test_a_run_of_the_reference_implementation_that_has_saved_both_state_dicts_goes_on(base: Any, first: str) -> None:
    """Some save the base optimizer's beside it, to keep the momentum, and load the two in either order."""
    options: dict[str, Any] = {"lr": 0.1} if base is torch.optim.AdamW else {"lr": 0.1, "momentum": 0.9}
    params = make_params([30, 7])
    optimizer = SAM(params, base, **options)
    sam_steps(params, optimizer, range(3))
    of_base = copy.deepcopy(optimizer.state_dict())
    of_sam = copy.deepcopy(of_base)
    of_sam["state"] = {index: {"old_p": p.detach().clone()} for index, p in enumerate(params)}
    resumed = copy.deepcopy(params)
    twin = SAM(resumed, base, **options)
    if first == "base":
        twin.base_optimizer.load_state_dict(of_base)
    with pytest.warns(UserWarning, match="saves no state of the base optimizer"):
        twin.load_state_dict(of_sam)
    if first == "sam":
        twin.base_optimizer.load_state_dict(of_base)
    sam_steps(params, optimizer, range(3, 6))
    sam_steps(resumed, twin, range(3, 6))
    assert same_bits(params, resumed)


def test_a_variants_own_copy_of_the_weights_is_dropped_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    """The momentum beside it is loaded; what else is there may be needed by the next step."""
    params = make_params([3])
    optimizer = SAM(params, lr=0.1, momentum=0.9)
    sam_steps(params, optimizer, range(2))
    optimizer.state[params[0]].update(old_p=torch.zeros(3), e_w=torch.ones(3))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[params[0]].keys() == {"momentum_buffer", "e_w"}
    assert not recwarn.list


# ---- Copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="copies")
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_made_in_mid_training_goes_on_with_the_same_bits(how: str, flatten: bool, tmp_path: Path) -> None:
    params = make_params([30, 7])
    optimizer = SAM(params, torch.optim.AdamW, lr=0.1, flatten=flatten)
    sam_steps(params, optimizer, range(3))
    if how == "deepcopy":
        twin = copy.deepcopy(optimizer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(optimizer))
    else:
        torch.save(optimizer, tmp_path / "optimizer.pt")
        twin = torch.load(tmp_path / "optimizer.pt", weights_only=False)
    its: list[nn.Parameter] = twin.param_groups[0]["params"]
    assert {p.data_ptr() for p in its}.isdisjoint(p.data_ptr() for p in params)
    sam_steps(params, optimizer, range(3, 6))
    assert not same_bits(its, params)
    sam_steps(its, twin, range(3, 6))
    assert same_bits(its, params)


def test_copies_keep_backend_flatten_and_perturb_eps(backend: str, flatten: bool) -> None:
    """A large perturb_eps halves e for this gradient of norm 1; the copies must do the same, in flat buffers if the
    original does.
    """
    p = nn.Parameter(torch.zeros(4))
    optimizer = SAM([p], lr=0.1, rho=0.2, perturb_eps=1.0, backend=backend, flatten=flatten)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        q = twin.param_groups[0]["params"][0]
        q.grad = torch.full((4,), 0.5)
        twin.first_step()
        torch.testing.assert_close(q.detach(), torch.full((4,), 0.05))
        twin.restore()
        twin.zero_grad()
        assert (q.grad is not None) is flatten


def test_a_pickle_of_version_0_1_0_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a net of skorch's, which has the optimizer in it."""
    params = make_params([3])
    optimizer = SAM(params, lr=0.1, rho=0.3)
    sam_steps(params, optimizer, range(1))
    held = ("defaults", "base_optimizer", "_sam_defaults", "_perturbation")
    state = {name: value for name, value in optimizer.__getstate__().items() if name in held}
    monkeypatch.setattr(SAM, "__getstate__", lambda _: state)
    twin = pickle.loads(pickle.dumps(optimizer))
    monkeypatch.undo()
    own = twin.param_groups[0]["params"]
    for q, o in ((params, optimizer), (own, twin)):
        sam_steps(q, o, range(1, 3))
        o.step(lambda q=q: give(q, 9))
    assert same_bits(params, own)
    assert pickle.loads(pickle.dumps(twin)).param_groups[0]["rho"] == 0.3


def test_a_shallow_copy_leaves_the_parameters_where_they_are(flatten: bool) -> None:
    """A parameter's address never changes after construction."""
    params = make_params([30, 7])
    optimizer = SAM(params, lr=0.1, flatten=flatten)
    before = [p.data_ptr() for p in params]
    copy.copy(optimizer)
    assert [p.data_ptr() for p in params] == before


@pytest.mark.xfail(
    strict=True, reason="proposed: pickle writes the whole flat buffer once per parameter; torch.save does not"
)
def test_a_pickle_of_flat_parameters_holds_every_weight_once() -> None:
    """Bounded by twice what plain SGD's pickle of the same parameters takes."""
    plain = len(pickle.dumps(torch.optim.SGD(make_params([100] * 100, grads=False), lr=0.1)))
    optimizer = SAM(make_params([100] * 100, grads=False), lr=0.1, flatten=True)
    assert len(pickle.dumps(optimizer)) < 2 * plain


def test_grad_norm_is_the_last_steps_after_a_group_was_added(flatten: bool) -> None:
    params = make_params([30])
    optimizer = SAM(params, lr=0.1, flatten=flatten)
    optimizer.first_step()
    optimizer.second_step()
    last: Tensor = optimizer.grad_norm
    optimizer.add_param_group({"params": make_params([5])})
    assert float(optimizer.grad_norm) == float(last)
