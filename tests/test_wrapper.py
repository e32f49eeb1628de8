"""Frameworks' wrappers around the optimizer, hooks, entries of others in the state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import give_doubles, make_params, same_bits, two_passes, values, wrap
from plain_sam import PlainSAM, furthest
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sam_fast import SAM

CLOSE = 1e-12


# ---- Wrappers of frameworks ------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="wrappers")
def test_either_object_may_make_any_call():
    params, twin = make_params([5, 30], torch.float64), make_params([5, 30], torch.float64)
    optimizer = SAM(params, lr=0.1, rho=0.5, momentum=0.9)
    wrapper, plain = wrap(optimizer), PlainSAM(twin, lr=0.1, rho=0.5, momentum=0.9)
    assert isinstance(wrapper, SAM)
    for step in range(8):
        first, second = (wrapper if step & bit else optimizer for bit in (1, 2))
        give_doubles(params, 2 * step), give_doubles(twin, 2 * step)
        first.first_step(zero_grad=True)
        assert wrapper.perturbed
        assert optimizer.perturbed
        plain.first_step()
        give_doubles(params, 2 * step + 1), give_doubles(twin, 2 * step + 1)
        if step & 4:
            second.step()
        else:
            second.second_step(zero_grad=True)
        plain.second_step()
    assert furthest(params, twin) < CLOSE
    assert wrapper.state is optimizer.state
    assert wrapper.second_step_path == optimizer.second_step_path == "fused"
    assert float(wrapper.grad_norm) == float(optimizer.grad_norm)


@pytest.mark.guarantee(id="wrappers")
@pytest.mark.parametrize("sets", ["wrapper", "optimizer"])
def test_what_first_pass_was_told_reaches_the_step(sets):
    """Without synchronisation an overflow of one rank must not make it skip alone, whichever object was told."""
    params = make_params([4])
    optimizer = SAM(params, lr=0.1)
    wrapper = wrap(optimizer)
    told, other = (wrapper, optimizer) if sets == "wrapper" else (optimizer, wrapper)
    with told.first_pass(nn.ParameterList(params), replay_rng=True, sync=False):
        pass
    assert other._step.own_gradient
    assert other._step.random_states
    two_passes(other, params, 1)
    assert not told._step.own_gradient
    assert not told._step.random_states


def test_a_group_added_through_a_wrapper_is_there():
    params, more = make_params([4]), make_params([3])
    optimizer = SAM(params, lr=0.1, rho=0.5)
    wrap(optimizer).add_param_group({"params": more, "rho": 0.1})
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.1]
    before = values(more)
    two_passes(optimizer, [*params, *more], 1)
    assert not same_bits(values(more), before)


# ---- Entries of others in the state ----------------------------------------------------------------------------------


@pytest.mark.guarantee(id="others-state")
@pytest.mark.parametrize(
    "base", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adagrad]
)
@pytest.mark.parametrize("when", ["before the first step", "for one of them", "later"])
def test_entries_of_a_variant_of_sam_in_the_state(base, when):
    """GSAM, LookSAM, ESAM keep ``state[p]["old_g"]``; PyTorch's optimizers take a state that is not empty for their
    own.
    """
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    params, twin = make_params([5, 9], torch.float64), make_params([5, 9], torch.float64)
    optimizer, plain = SAM(params, base, lr=0.01, **options), PlainSAM(twin, base, lr=0.01, **options)
    for step in range(4):
        chosen = {"before the first step": params, "for one of them": params[1:], "later": params if step else []}[when]
        for p in chosen:
            optimizer.state[p]["old_g"] = torch.full_like(p, step)
        two_passes(optimizer, params, step)
        two_passes(plain, twin, step)
        assert all(torch.equal(optimizer.state[p]["old_g"], torch.full_like(p, step)) for p in chosen)
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert furthest(params, twin) < 1e-9
    for p, q in zip(params, twin, strict=True):
        assert set(optimizer.state[p]) - {"old_g"} == set(plain.base.state[q])


# ---- Hooks, schedulers, counters -------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="hooks")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_global_hooks_run_once_per_step(base):
    params, seen = make_params([5]), []
    optimizer = SAM(params, base, lr=0.1)
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("pre", type(o)))),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("post", type(o)))),
    ]
    try:
        two_passes(optimizer, params, 1)
        optimizer.step(lambda: (params[0] ** 2).sum().backward(), passes="both")
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("pre", SAM), ("post", SAM)] * 2


@pytest.mark.guarantee(id="fused-step")
@pytest.mark.parametrize("on", ["base_optimizer", "SAM", "both"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_scheduler_on_the_base_optimizer_keeps_the_fused_step(base, on, recwarn):
    params, twin = make_params([50], torch.float64), make_params([50], torch.float64)
    optimizer, plain = SAM(params, base, lr=0.1), PlainSAM(twin, base, lr=0.1)
    scheduled = {
        "base_optimizer": [optimizer.base_optimizer],
        "SAM": [optimizer],
        "both": [optimizer, optimizer.base_optimizer],
    }[on]
    schedulers = [lr_scheduler.ExponentialLR(each, 0.5) for each in scheduled]
    theirs = [lr_scheduler.ExponentialLR(plain.base, 0.5) for _ in scheduled]
    for step in range(4):
        two_passes(optimizer, params, step)
        assert optimizer.second_step_path == "fused"
        two_passes(plain, twin, step)
        for scheduler in (*schedulers, *theirs):
            scheduler.step()
    assert furthest(params, twin) < 1e-9
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@pytest.fixture
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.guarantee(id="fused-step")
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("resumed", [False, True])
def test_counters_in_float64_keep_the_fused_step(double_by_default, backend, resumed):
    def parameters() -> list[nn.Parameter]:
        return [*make_params([50, 0, 700], torch.float64), *make_params([33], torch.float32)]

    params, twin = parameters(), parameters()
    optimizer = SAM(params, torch.optim.AdamW, lr=0.01, backend=backend)
    plain = PlainSAM(twin, torch.optim.AdamW, lr=0.01)
    for step in range(5):
        if resumed and step == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 3:  # one that takes no step
            give_doubles(params, 99)
        two_passes(optimizer, params, step)
        assert optimizer.second_step_path == "fused"
        two_passes(plain, twin, step)
        for p, q in zip(params, twin, strict=True):
            own, expected = optimizer.state[p]["step"], plain.base.state[q]["step"]
            assert own.dtype == expected.dtype == torch.float64
            assert float(own) == float(expected) == step + 1
    assert furthest(params[:3], twin[:3]) < 1e-9
    assert furthest(params[3:], twin[3:]) < 1e-5


@pytest.mark.guarantee(id="fused-step")
def test_the_reason_why_a_step_is_not_fused_can_be_read():
    params = make_params([5])
    optimizer = SAM(params, torch.optim.RMSprop, lr=0.1)
    assert "no second step" in optimizer.second_step_path
    two_passes(optimizer, params, 1)
    assert "RMSprop" in optimizer.second_step_path
    optimizer = SAM(params, torch.optim.SGD, lr=0.1)
    optimizer.base_optimizer.register_step_post_hook(lambda *_: None)
    two_passes(optimizer, params, 1)
    assert "hooks" in optimizer.second_step_path


@pytest.mark.parametrize("option", ["rho", "eta"])
@pytest.mark.parametrize("value", [math.nan, -0.1, math.inf, torch.tensor(math.nan)])
def test_an_option_that_became_bad_later_is_noticed(option, value):
    params = make_params([5])
    optimizer = SAM(params, lr=0.1)
    two_passes(optimizer, params, 1)
    before = values(params)
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=option):
        optimizer.first_step()
    assert not optimizer.perturbed
    assert same_bits(values(params), before)


# ---- PyTorch's fused steps on the CPU --------------------------------------------------------------------------------


class Derived(torch.optim.Adam):
    """Somebody's own."""


@pytest.mark.guarantee(id="fused-cpu-bugs")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, Derived])
@pytest.mark.parametrize("hooked", [False, True], ids=["ours", "the base's"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", ["channels_last", "gaps"])
def test_what_pytorchs_fused_steps_misread_is_not_inherited(base, hooked, dtype, layout):
    """A gradient with another layout than its parameter's, a parameter with gaps, and SGD in 16 bits: wrong with
    fused=True in PyTorch itself.
    """
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    last = weight.contiguous(memory_format=torch.channels_last)
    p = nn.Parameter(last if layout == "channels_last" else torch.stack([weight, weight], -1)[..., 0])
    q = nn.Parameter(weight.float())
    optimizer = SAM([p], base, lr=0.1, fused=True, **options)
    if hooked:
        optimizer.base_optimizer.register_step_pre_hook(lambda *_: None)
    plain = base([q], lr=0.1, **options)
    for step in range(3):
        gradients = [
            torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(10 * step + k)).to(dtype) for k in range(2)
        ]
        p.grad = gradients[0].clone()
        optimizer.first_step()
        p.grad = gradients[1].clone()
        assert p.grad.stride() != p.stride()
        optimizer.second_step()
        assert optimizer.param_groups[0]["fused"] is True
        q.grad = gradients[1].float()
        plain.step()
    assert isinstance(p.grad, Tensor)
    # In bfloat16 each of a few operations on each of three steps rounds by up to 2^-9.
    assert furthest([p.float()], [q]) < (1e-6 if dtype == torch.float32 else 0.05)


@pytest.mark.guarantee(id="fused-cpu-bugs")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_state_that_lies_otherwise_than_its_parameter_is_not_misread(base):
    """As that of a checkpoint from before the model was made channels_last."""
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    twin = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = base([twin], lr=0.1, **options)
    twin.grad = torch.ones(4, 3, 2, 2).cumsum(1)
    plain.step()
    p = nn.Parameter(twin.detach().contiguous(memory_format=torch.channels_last))
    optimizer = SAM([p], base, lr=0.1, **options)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    optimizer.param_groups[0]["fused"] = True
    p.grad = twin.grad.clone(memory_format=torch.channels_last)
    optimizer.first_step()
    optimizer.second_step()
    plain.step()
    assert furthest([p], [twin]) < 1e-6


# ---- Scalers and late gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [None, "first", "second"])
def test_a_scaler_of_ones_own_on_a_frameworks_wrapper(overflow):
    """It sets scale and overflow on the wrapper; the step is the optimizer's."""
    params, twin = make_params([5, 9]), make_params([5, 9])
    optimizer, plain = SAM(params, lr=0.1, rho=0.5), PlainSAM(twin, lr=0.1, rho=0.5)
    wrapper, scaler = wrap(optimizer), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    before = values(params)
    for name, each in (("first", wrapper.first_step), ("second", lambda: scaler.step(wrapper))):
        give_doubles(params, len(name)), give_doubles(twin, len(name))
        for p in params:
            p.grad *= 1024.0
        if overflow == name:
            params[0].grad[0] = math.inf
        each()
        plain.first_step() if name == "first" else plain.second_step()
    scaler.update()
    assert scaler.get_scale() == (1024.0 if overflow is None else 512.0)
    assert not hasattr(optimizer, "found_inf")
    assert not optimizer.perturbed
    if overflow is None:
        assert furthest(params, twin) < 1e-6
    else:
        assert same_bits(values(params), before)


@pytest.mark.parametrize("base", [torch.optim.RMSprop, torch.optim.NAdam])
def test_entries_of_others_and_a_first_gradient_that_comes_later(base):
    params, twin = make_params([5, 9], torch.float64), make_params([5, 9], torch.float64)
    optimizer, plain = SAM(params, base, lr=0.01), PlainSAM(twin, base, lr=0.01)
    for p in params:
        optimizer.state[p]["mine"] = torch.ones(1)
    for step in range(4):
        for own, each in ((params, optimizer), (twin, plain)):
            for advance in ("first_step", "second_step"):
                give_doubles(own, step)
                if step < 2:
                    own[1].grad = None
                getattr(each, advance)()
    assert furthest(params, twin) < 1e-9
    assert all(optimizer.state[p]["mine"] == 1 for p in params)


@pytest.mark.guarantee(id="others-state")
@pytest.mark.parametrize("base", [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adamax, torch.optim.AdamW])
@pytest.mark.parametrize("when", ["restored by name", "added", "replaced"])
def test_the_base_optimizers_own_state_may_be_put_there_by_hand(base, when):
    params, twin = make_params([5, 9], torch.float64), make_params([5, 9], torch.float64)
    count = 1 if when == "added" else 2
    optimizer, plain = SAM(params[:count], base, lr=0.01), PlainSAM(twin[:count], base, lr=0.01)
    for step in range(6):
        if step == 3:
            for own, each in ((params, optimizer), (twin, plain.base)):
                states = [copy.deepcopy(each.state[p]) for p in own[:count]]
                if when == "restored by name":
                    each.state.clear()
                elif when == "replaced":
                    own[1] = each.param_groups[0]["params"][1] = torch.nn.Parameter(own[1].detach().clone())
                else:
                    each.add_param_group({"params": own[1:]})
                    new = torch.full_like(own[1], 0.5)
                    states.append({name: t if t.dim() == 0 else new.clone() for name, t in states[0].items()})
                each.state.update(zip(own, copy.deepcopy(states), strict=True))
            if when == "restored by name":  # in another program
                optimizer, state = SAM(params, base, lr=0.01), optimizer.state
                optimizer.state.update(state)
        for each, own in ((optimizer, params), (plain, twin)):
            two_passes(each, own, step)
    assert furthest(params, twin) < 1e-9


class Counting(torch.optim.SGD):
    """Counts its steps in an entry that is no parameter's, as MADGRAD and SPAM do."""

    def step(self, closure=None):
        super().step(closure)
        self.state["steps"] = self.state.get("steps", 0) + 1


@pytest.mark.parametrize("whose", ["base optimizer's", "user's"])
def test_entries_that_are_no_parameters(whose):
    params, twin = make_params([5, 6], torch.float64), make_params([5, 6], torch.float64)
    base = Counting if whose == "base optimizer's" else torch.optim.AdamW
    options = {"lr": 0.1, "momentum": 0.9} if base is Counting else {"lr": 0.1}
    optimizer, plain = SAM(params, base, rho=0.5, **options), PlainSAM(twin, base, rho=0.5, **options)
    if whose == "user's":
        optimizer.state["steps"] = 7
    for step in range(6):
        if step == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for advance in ("first_step", "second_step"):
            give_doubles(params, step), give_doubles(twin, step)
            getattr(optimizer, advance)()
            getattr(plain, advance)()
    assert furthest(params, twin) < CLOSE
    assert optimizer.state["steps"] == (6 if base is Counting else 7)
