"""An optimizer around an optimizer: frameworks' wrappers, base optimizers of every origin, hooks, entries of others in
the state.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from cases import make_params, same_bits, values
from plain_sam import PlainSAM, furthest
from torch import Tensor, nn
from torch.autograd import grad
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sam_fast import SAM

CLOSE = 1e-12


def give(params: list[nn.Parameter], seed: int) -> None:
    for p, g in zip(params, make_params([p.numel() for p in params], torch.float64, seed), strict=True):
        p.grad = g.detach().reshape(p.shape).to(p.dtype)


def sam_step(optimizer: Any, params: list[nn.Parameter], seed: int) -> None:
    give(params, 2 * seed)
    optimizer.first_step()
    give(params, 2 * seed + 1)
    optimizer.second_step()


# ---- Wrappers of frameworks ------------------------------------------------------------------------------------------


def wrap(optimizer: Optimizer) -> Any:
    """As Lightning and Fabric do: an object of a subclass with its own attributes that falls back on the
    optimizer's.
    """

    class Wrapper:
        def __init__(self, inner: Optimizer) -> None:
            self._optimizer = inner
            self.__class__ = type("Wrapped" + type(inner).__name__, (self.__class__, type(inner)), {})

        def step(self, closure: Any = None, **options: Any) -> Any:
            return self._optimizer.step(closure, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._optimizer, name)

    return Wrapper(optimizer)


@pytest.mark.guarantee(id="wrappers")
def test_either_object_may_make_any_call():
    params, twin = make_params([5, 30], torch.float64), make_params([5, 30], torch.float64)
    optimizer = SAM(params, lr=0.1, rho=0.5, momentum=0.9)
    wrapper, plain = wrap(optimizer), PlainSAM(twin, lr=0.1, rho=0.5, momentum=0.9)
    assert isinstance(wrapper, SAM)
    for step in range(8):
        first, second = (wrapper if step & bit else optimizer for bit in (1, 2))
        give(params, 2 * step), give(twin, 2 * step)
        first.first_step(zero_grad=True)
        assert wrapper.perturbed
        assert optimizer.perturbed
        plain.first_step()
        give(params, 2 * step + 1), give(twin, 2 * step + 1)
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
    assert other._step.random_state is not None
    sam_step(other, params, 1)
    assert not told._step.own_gradient
    assert told._step.random_state is None


def test_a_group_added_through_a_wrapper_is_there():
    params, more = make_params([4]), make_params([3])
    optimizer = SAM(params, lr=0.1, rho=0.5)
    wrap(optimizer).add_param_group({"params": more, "rho": 0.1})
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.1]
    before = values(more)
    sam_step(optimizer, [*params, *more], 1)
    assert not same_bits(values(more), before)


# ---- What the base optimizer has of its own --------------------------------------------------------------------------


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers are: eval() exchanges the weights, train() puts them back."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.mode, self.alpha = "train", 0.25

    def _switch(self, mode: str, sign: float) -> None:
        if self.mode != mode:
            self.mode = mode
            for group in self.param_groups:
                torch._foreach_add_([p.data for p in group["params"]], sign)

    def eval(self) -> None:
        self._switch("eval", 1.0)

    def train(self) -> None:
        self._switch("train", -1.0)


@pytest.mark.guarantee(id="train-eval")
def test_train_and_eval_reach_the_base_optimizer_between_steps():
    params = make_params([4])
    before = values(params)
    optimizer = SAM(params, Averaging, lr=0.1)
    for each in (optimizer, wrap(optimizer)):
        each.eval()
        assert optimizer.base_optimizer.mode == "eval"
        assert furthest(params, [w + 1 for w in before]) == 0.0
        each.train()
        assert each.mode == "train"
        assert each.alpha == 0.25
    optimizer.first_step()
    for switch in (optimizer.eval, optimizer.train):
        with pytest.raises(RuntimeError, match=r"restore\(\)"):
            switch()
    optimizer.restore()


def test_a_base_optimizer_without_train_has_none():
    optimizer = SAM(make_params([4]), lr=0.1)
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "_private_to_nobody")
    assert not hasattr(optimizer, "found_inf")
    with pytest.raises(AttributeError, match=r"'SAM'.*'nonsense'.*SGD"):
        _ = optimizer.nonsense


# ---- Where the base optimizer comes from -----------------------------------------------------------------------------


@pytest.mark.guarantee(id="base-optimizer")
@pytest.mark.parametrize(
    "base", ["torch.optim.SGD", "torch.optim.sgd.SGD", functools.partial(torch.optim.SGD, momentum=0.9)]
)
def test_a_base_optimizer_by_name_or_partial(base):
    params, twin = make_params([5], torch.float64), make_params([5], torch.float64)
    optimizer = SAM(params, base, lr=0.1)
    plain = PlainSAM(twin, functools.partial(torch.optim.SGD, momentum=0.0 if isinstance(base, str) else 0.9), lr=0.1)
    for step in range(3):
        sam_step(optimizer, params, step)
        sam_step(plain, twin, step)
    assert furthest(params, twin) < CLOSE


@pytest.mark.guarantee(id="base-optimizer")
def test_an_optimizer_that_is_there_already():
    """In mid-training, with a scheduler on it: one state, one list of groups."""
    params, twin = make_params([5, 8], torch.float64), make_params([5, 8], torch.float64)
    mine, its = (
        torch.optim.SGD([{"params": own[:1], "lr": 0.1}, {"params": own[1:]}], lr=0.2, momentum=0.9)
        for own in (params, twin)
    )
    schedulers = [lr_scheduler.ExponentialLR(o, 0.5) for o in (mine, its)]
    for own, o in ((params, mine), (twin, its)):
        give(own, 50)
        o.step()
    optimizer = SAM(mine, rho=0.5)
    assert optimizer.base_optimizer is mine
    assert optimizer.state is mine.state
    assert optimizer.param_groups is mine.param_groups
    plain = PlainSAM(twin, lambda *_, **__: its, rho=0.5)
    for step in range(4):
        sam_step(optimizer, params, step)
        assert optimizer.second_step_path == "fused"
        sam_step(plain, twin, step)
        for scheduler in schedulers:
            scheduler.step()
    assert furthest(params, twin) < CLOSE


@pytest.mark.parametrize("base", [torch.optim.Adadelta, SAM])
def test_an_optimizer_whose_options_collide_is_refused_and_left_as_it_was(base):
    existing = base(make_params([3]), lr=0.1)
    groups = copy.deepcopy(existing.param_groups)
    with pytest.raises(ValueError, match="rho"):
        SAM(existing)
    assert [group.keys() for group in existing.param_groups] == [group.keys() for group in groups]


def decay_groups(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    """Makes its own groups, as timm does, with and without weight decay."""
    params = [p for group in groups for p in group["params"]]
    own = [
        {"params": [p for p in params if (p.ndim > 1) == many], "weight_decay": 0.1 * many} for many in (True, False)
    ]
    return torch.optim.AdamW(own, **options)


@pytest.mark.guarantee(id="base-optimizer")
def test_groups_of_the_base_optimizers_own_take_sams_options():
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]
    optimizer = SAM(params, decay_groups, lr=0.1, rho=0.3, adaptive=True)
    assert [(group["rho"], group["adaptive"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.3, True, 0.1),
        (0.3, True, 0.0),
    ]
    sam_step(optimizer, params, 1)
    assert optimizer.second_step_path == "fused"
    kept = SAM([{"params": params, "rho": 0.7}], decay_groups, lr=0.1)
    assert [group["rho"] for group in kept.param_groups] == [0.7, 0.7]
    mixed = [{"params": [nn.Parameter(torch.ones(3))], "rho": rho} for rho in (0.1, 0.2)]
    with pytest.raises(ValueError, match=r"group 1.*rho"):
        SAM(mixed, decay_groups, lr=0.1)


class Outer(Optimizer):
    """Wraps another optimizer and has its own format of checkpoints, as Lookahead has."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.count = inner, 0
        self.defaults = inner.defaults
        self._optimizer_step_pre_hooks = self._optimizer_step_post_hooks = {}  # type: ignore[assignment]

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return {"outer": self.count, "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["outer"]
        self.inner.load_state_dict(state_dict["inner"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


@pytest.mark.guarantee(id="base-optimizer")
def test_a_wrapper_of_an_optimizer_as_base_saves_and_loads_in_its_own_format():
    def make(params: Any) -> SAM:
        return SAM(params, lambda groups, **options: Outer(torch.optim.SGD(groups, **options)), lr=0.1, momentum=0.9)

    whole, parts = make_params([6]), make_params([6])
    optimizer = make(whole)
    for step in range(5):
        sam_step(optimizer, whole, step)
    before = make(parts)
    for step in range(3):
        sam_step(before, parts, step)
    resumed = make(parts)
    resumed.load_state_dict(copy.deepcopy(before.state_dict()))
    assert resumed.base_optimizer.count == 3
    for step in range(3, 5):
        sam_step(resumed, parts, step)
    assert same_bits(values(whole), values(parts))


class Hessian(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        self.estimate()

    def estimate(self) -> None:
        torch.autograd.grad([], [])


class Harmless(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        with torch.autograd.profiler.record_function("step"):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-1.0)


def test_base_optimizers_that_differentiate_gradients_are_refused():
    with pytest.raises(ValueError, match="Hessian differentiates gradients"):
        SAM(make_params([3]), Hessian, lr=0.1)
    SAM(make_params([3]), Harmless, lr=0.1)


@pytest.mark.parametrize("name", ["AdaHessian", "SophiaH"])
def test_hessian_based_optimizers_of_pytorch_optimizer_are_refused(name):
    peers = pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ValueError, match=f"{name} differentiates gradients"):
        SAM(make_params([3]), getattr(peers, name), lr=0.1)


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
        sam_step(optimizer, params, step)
        sam_step(plain, twin, step)
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
        sam_step(optimizer, params, 1)
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
        sam_step(optimizer, params, step)
        assert optimizer.second_step_path == "fused"
        sam_step(plain, twin, step)
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
            give(params, 99)
        sam_step(optimizer, params, step)
        assert optimizer.second_step_path == "fused"
        sam_step(plain, twin, step)
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
    sam_step(optimizer, params, 1)
    assert "RMSprop" in optimizer.second_step_path
    optimizer = SAM(params, torch.optim.SGD, lr=0.1)
    optimizer.base_optimizer.register_step_post_hook(lambda *_: None)
    sam_step(optimizer, params, 1)
    assert "hooks" in optimizer.second_step_path


@pytest.mark.parametrize("option", ["rho", "eta"])
@pytest.mark.parametrize("value", [math.nan, -0.1, math.inf, torch.tensor(math.nan)])
def test_an_option_that_became_bad_later_is_noticed(option, value):
    params = make_params([5])
    optimizer = SAM(params, lr=0.1)
    sam_step(optimizer, params, 1)
    before = values(params)
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=option):
        optimizer.first_step()
    assert not optimizer.perturbed
    assert same_bits(values(params), before)


# ---- PyTorch's fused steps on the CPU --------------------------------------------------------------------------------


@pytest.mark.guarantee(id="fused-cpu-bugs")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("hooked", [False, True], ids=["ours", "the base's"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
def test_what_pytorchs_fused_steps_misread_is_not_inherited(base, hooked, dtype):
    """A gradient with another layout than its parameter's, and SGD in 16 bits: wrong with fused=True in
    PyTorch itself.
    """
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(weight.to(dtype).to(memory_format=torch.channels_last))
    q = nn.Parameter(weight.to(dtype).float())
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


# ---- What a review found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [None, "first", "second"])
def test_a_scaler_of_ones_own_on_a_frameworks_wrapper(overflow):
    """It sets scale and overflow on the wrapper; the step is the optimizer's."""
    params, twin = make_params([5, 9]), make_params([5, 9])
    optimizer, plain = SAM(params, lr=0.1, rho=0.5), PlainSAM(twin, lr=0.1, rho=0.5)
    wrapper, scaler = wrap(optimizer), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    before = values(params)
    for name, each in (("first", wrapper.first_step), ("second", lambda: scaler.step(wrapper))):
        give(params, len(name)), give(twin, len(name))
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


def test_groups_that_an_instance_got_later_or_loaded_take_the_options():
    params, more = make_params([4]), make_params([3])
    mine = torch.optim.SGD(params, lr=0.1)
    plain = copy.deepcopy(mine.state_dict())
    optimizer = SAM(mine, rho=0.3)
    mine.add_param_group({"params": more})
    sam_step(optimizer, [*params, *more], 1)
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.3]
    only = SAM(torch.optim.SGD(make_params([4]), lr=0.1), rho=0.3)
    only.base_optimizer.load_state_dict(plain)
    sam_step(only, only.param_groups[0]["params"], 1)
    assert only.param_groups[0]["rho"] == 0.3


def test_a_bad_option_leaves_an_instance_as_it_was():
    mine = torch.optim.SGD(make_params([4]), lr=0.1)
    with pytest.raises(ValueError, match="rho"):
        SAM(mine, rho=-1.0)
    assert "rho" not in mine.param_groups[0]
    SAM(mine, rho=0.2)


@pytest.mark.parametrize("base", [torch.optim.RMSprop, torch.optim.NAdam])
def test_entries_of_others_and_a_first_gradient_that_comes_later(base):
    params, twin = make_params([5, 9], torch.float64), make_params([5, 9], torch.float64)
    optimizer, plain = SAM(params, base, lr=0.01), PlainSAM(twin, base, lr=0.01)
    for p in params:
        optimizer.state[p]["mine"] = torch.ones(1)
    for step in range(4):
        for own, each in ((params, optimizer), (twin, plain)):
            for advance in ("first_step", "second_step"):
                give(own, step)
                if step < 2:
                    own[1].grad = None
                getattr(each, advance)()
    assert furthest(params, twin) < 1e-9
    assert all(optimizer.state[p]["mine"] == 1 for p in params)


def imported_grad(*_: Any) -> None:
    grad([], [])


class Imported(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        imported_grad()


class Below(Hessian):
    def step(self, closure: Any = None) -> None:
        super().step()


@pytest.mark.parametrize("base", [Imported, Below])
def test_however_it_is_written(base):
    with pytest.raises(ValueError, match="differentiates gradients"):
        SAM(make_params([3]), base, lr=0.1)


class TakesNothing(torch.optim.SGD):
    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def test_a_zero_grad_that_takes_nothing():
    params = make_params([3])
    SAM(params, TakesNothing, lr=0.1).zero_grad()
    assert params[0].grad is None


class MakesStateEarly(torch.optim.RMSprop):
    """Makes a parameter's state when it is given, not in its step."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p] = {"step": torch.tensor(0.0), "square_avg": torch.full_like(p, 2.0)}


def test_state_that_the_base_optimizer_makes_of_a_new_group_is_its_own():
    params, twin = make_params([5, 9], torch.float64), make_params([5, 9], torch.float64)
    optimizer, plain = SAM(params[:1], MakesStateEarly, lr=0.01), PlainSAM(twin[:1], MakesStateEarly, lr=0.01)
    optimizer.add_param_group({"params": params[1:]})
    plain.base.add_param_group({"params": twin[1:]})
    for step in range(3):
        sam_step(optimizer, params, step)
        sam_step(plain, twin, step)
    assert furthest(params, twin) < 1e-9
