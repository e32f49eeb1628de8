"""SAM passes the tests that torch has for its own optimizers.

Wherever it can be, the oracle is torch's own optimizer on the same calls.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import buckets_of, make_params, normal, same_bits, same_step, values
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch_conformance import REFUSED, optimizer_infos

from sam_fast import SAM, backends
from sam_fast.backends.bucket import CHUNK
from sam_fast.backends.native import FIELDS

each_optimizer = pytest.mark.parametrize("index", range(12), ids=lambda i: f"info{i}")
BASES = [torch.optim.SGD, torch.optim.AdamW]
bases = pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)


@pytest.fixture
def info(index: int) -> Any:
    return optimizer_infos()[index]


@pytest.mark.guarantee(id="every-optimizer")
def test_every_optimizer_of_torch_is_covered() -> None:
    """A new optimizer in torch must be tested, or refused with a reason."""
    known = {
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    } - {"Optimizer"}
    assert {info.name for info in optimizer_infos()} == known - set(REFUSED)
    assert len(optimizer_infos()) == 12


def two_dimensional(seed: int = 0) -> list[nn.Parameter]:
    """Muon takes matrices only."""
    flat = make_params([12, 35, 1], seed=seed, grads=False)
    return [nn.Parameter(p.detach().reshape(shape)) for p, shape in zip(flat, [(3, 4), (5, 7), (1, 1)], strict=True)]


def give(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = normal(p.shape, generator).to(p.dtype)


def sam_step(optimizer: SAM, params: list[nn.Parameter], seed: int) -> None:
    """A first gradient that the result must not depend on, since w comes back; then the second."""
    give(params, 1000 + seed)
    optimizer.first_step()
    give(params, seed)
    optimizer.second_step()


def plain_step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int) -> None:
    give(params, seed)
    optimizer.step()


# ---- Constructor -----------------------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="torch-errors")
@each_optimizer
def test_constructor_errors_are_torchs(info: Any) -> None:
    for case in info.optim_error_inputs_func("cpu", torch.float32):
        entry = case.optimizer_error_input
        params = two_dimensional() if entry.params is None else entry.params
        words = "params must be an iterable" if isinstance(params, Tensor) else case.error_regex
        if issubclass(case.error_type, Warning):
            with pytest.warns(case.error_type, match=words):
                SAM(params, info.optim_cls, **entry.kwargs)
        elif case.error_on.name == "STEP_ERROR":
            optimizer, before = SAM(params, info.optim_cls, **entry.kwargs), values(params)
            optimizer.first_step()
            with pytest.raises(case.error_type, match=words):
                optimizer.second_step()
            assert same_bits(params, before)
        else:
            with pytest.raises(case.error_type, match=words):
                SAM(params, info.optim_cls, **entry.kwargs)


def leaf() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


@pytest.mark.guarantee(id="torch-errors")
@bases
@pytest.mark.parametrize(
    "entry",
    [
        lambda: {"params": {leaf()}},
        lambda: {"params": [leaf() * 2]},
        lambda: {"params": [torch.ones(3).numpy()]},
        lambda: {"params": ["weight"]},
        lambda: {"params": [("weight", leaf()), leaf()]},
        lambda: [leaf()],
        dict,
    ],
    ids=["set", "not a leaf", "array", "string", "half named", "no dict", "no params"],
)
def test_a_group_that_torch_refuses_is_refused_alike(
    base: type[torch.optim.Optimizer], entry: Callable[[], Any]
) -> None:
    plain, optimizer = base([leaf()], lr=0.1), SAM([leaf()], base, lr=0.1)
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises
        plain.add_param_group(entry())
    with pytest.raises(expected.type, match=re.escape(str(expected.value)[:40])):
        optimizer.add_param_group(entry())
    assert len(optimizer.param_groups) == 1
    sam_step(optimizer, optimizer.param_groups[0]["params"], 0)
    if isinstance(entry(), dict) and entry():
        with pytest.raises(expected.type):
            SAM([entry()], base, lr=0.1)


# ---- Every optimizer with every option -------------------------------------------------------------------------------


@pytest.mark.guarantee(id="every-optimizer")
@each_optimizer
def test_every_option_steps_as_torchs_own(info: Any, flatten: bool) -> None:
    """Learning rates in tensors, weight decay, maximize, momentum...: restored weights and the second gradient give the
    base optimizer's own step.
    """
    for case in info.optim_inputs_func("cpu"):
        params, own = two_dimensional(), two_dimensional()
        optimizer, plain = (
            SAM(params, info.optim_cls, flatten=flatten, **case.kwargs),
            info.optim_cls(own, **case.kwargs),
        )
        for seed in range(3):
            sam_step(optimizer, params, seed)
            plain_step(plain, own, seed)
        assert same_step(info.optim_cls, params, own), case.desc


@pytest.mark.guarantee(id="state-dict")
@each_optimizer
def test_a_state_dict_determines_what_follows(info: Any, flatten: bool) -> None:
    """Saved with weights_only=True, loaded into a new optimizer: the same state dict, and the same bits from there
    on.
    """
    for case in info.optim_inputs_func("cpu")[-2:]:
        params = two_dimensional()
        optimizer = SAM(params, info.optim_cls, flatten=flatten, **case.kwargs)
        for seed in range(2):
            sam_step(optimizer, params, seed)
        first, second = (io.BytesIO() for _ in range(2))
        torch.save(optimizer.state_dict(), first)
        torch.save(optimizer.state_dict(), second)
        assert first.getvalue() == second.getvalue()
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        twin = SAM(twins, info.optim_cls, flatten=flatten, **case.kwargs)
        first.seek(0)
        twin.load_state_dict(torch.load(first, weights_only=True))
        assert pickle.dumps(str(twin.state_dict())) == pickle.dumps(str(optimizer.state_dict()))
        for seed in range(2, 4):
            sam_step(optimizer, params, seed)
            sam_step(twin, twins, seed)
        assert same_bits(params, twins), case.desc


@pytest.mark.guarantee(id="older-state-dicts")
@each_optimizer
def test_an_older_state_dict_loads(info: Any) -> None:
    """One from before the optimizer had some of its options, and before it was SAM's: they take the constructor's
    values.
    """
    params = two_dimensional()
    optimizer = SAM(params, info.optim_cls)
    sam_step(optimizer, params, 0)
    state = copy.deepcopy(optimizer.state_dict())
    newer = {*info.not_og_supported_flags, "rho", "adaptive", "eta", "perturb"}
    for group in state["param_groups"]:
        for name in newer & set(group):
            del group[name]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = SAM(twins, info.optim_cls)
    twin.load_state_dict(state)
    sam_step(optimizer, params, 1)
    sam_step(twin, twins, 1)
    assert same_bits(params, twins)


@pytest.mark.guarantee(id="older-state-dicts")
@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW])
def test_step_counters_that_are_numbers_load(base: type[torch.optim.Optimizer]) -> None:
    """As state dicts of PyTorch before 1.12 have them.

    The fused second step takes what the base optimizer makes of them.
    """
    params = two_dimensional()
    optimizer = SAM(params, base, lr=0.01)
    sam_step(optimizer, params, 0)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = entry["step"].item()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = SAM(twins, base, lr=0.01)
    twin.load_state_dict(state)
    sam_step(optimizer, params, 1)
    sam_step(twin, twins, 1)
    assert same_bits(params, twins)


@pytest.mark.guarantee(id="zero-gradients")
@each_optimizer
def test_zero_gradients_move_what_torch_moves(info: Any, flatten: bool) -> None:
    """Nothing, unless the base optimizer itself does (weight decay, momentum)."""
    params, own = two_dimensional(), two_dimensional()
    options = {} if info.name == "Rprop" else {"weight_decay": 0}
    optimizer, plain = SAM(params, info.optim_cls, flatten=flatten, **options), info.optim_cls(own, **options)
    before = values(params)
    for p in [*params, *own]:
        p.grad = torch.zeros_like(p)
    optimizer.first_step()
    assert same_bits(params, before)
    optimizer.second_step()
    plain.step()
    assert same_bits(params, own)
    if info.name not in ("ASGD", "Rprop"):
        assert same_bits(params, before)


@each_optimizer
def test_without_gradients_nothing_happens(info: Any) -> None:
    params = two_dimensional()
    optimizer = SAM(params, info.optim_cls)
    before = values(params)
    optimizer.first_step()
    optimizer.second_step()
    assert same_bits(params, before)
    assert float(optimizer.grad_norm) == 0.0


@each_optimizer
def test_gradients_that_are_none_at_some_steps(info: Any) -> None:
    params, own = two_dimensional(), two_dimensional()
    optimizer, plain = SAM(params, info.optim_cls), info.optim_cls(own)
    for step in range(5):
        give(params, 100 + step)
        params[step % 3].grad = None  # in the first pass, another one in the second
        optimizer.first_step()
        give(params, step)
        give(own, step)
        params[(step + 1) % 3].grad = own[(step + 1) % 3].grad = None
        optimizer.second_step()
        plain.step()
    assert same_step(info.optim_cls, params, own)


@pytest.mark.guarantee(id="hooks")
def test_schedulers_of_torch_give_the_same_learning_rates() -> None:
    for info in optimizer_infos():
        for makers in info.scheduler_inputs:
            params, own = two_dimensional(), two_dimensional()
            optimizer, plain = SAM(params, info.optim_cls, lr=0.1), info.optim_cls(own, lr=0.1)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", message=".*epoch parameter.*")
                schedulers, expected = [make(optimizer) for make in makers], [make(plain) for make in makers]
                for step in range(12):
                    sam_step(optimizer, params, step)
                    plain_step(plain, own, step)
                    for scheduler in (*schedulers, *expected):
                        scheduler.step(
                            *[1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []
                        )
                    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
            assert same_step(info.optim_cls, params, own), info.name


# ---- Parameters of every kind ----------------------------------------------------------------------------------------


@pytest.mark.guarantee(id="copies")
@bases
def test_learning_rate_and_weight_decay_of_each_group(base: type[torch.optim.Optimizer], flatten: bool) -> None:
    """Also of a group that is added in mid-training, whose state begins there."""
    params, own = make_params([17, 30, 5], grads=False), make_params([17, 30, 5], grads=False)

    def groups(of: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": of[:1], "lr": 0.3, "weight_decay": 0.1}, {"params": of[1:2]}]

    options: dict[str, Any] = {
        "lr": 0.01,
        "weight_decay": 0.02,
        **({"momentum": 0.9} if base is torch.optim.SGD else {}),
    }
    optimizer, plain = SAM(groups(params), base, flatten=flatten, **options), base(groups(own), **options)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": params[2:], "lr": 0.2})
            plain.add_param_group({"params": own[2:], "lr": 0.2})
        here = 3 if step >= 3 else 2
        sam_step(optimizer, params[:here], step)
        plain_step(plain, own[:here], step)
    assert same_step(base, params, own)


@pytest.mark.guarantee(id="layouts")
@bases
def test_a_parameter_without_dimensions(base: type[torch.optim.Optimizer], backend: str, flatten: bool) -> None:
    params = [nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3))]
    optimizer = SAM(params, base, lr=0.1, rho=0.5, backend=backend, flatten=flatten)
    own = [nn.Parameter(p.detach().clone()) for p in params]
    plain = base(own, lr=0.1)
    for step in range(2):
        before = values(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.first_step()
        for p, w in zip(params, before, strict=True):
            assert torch.allclose(p, w + 0.5 / 2, rtol=0, atol=1e-6)  # the norm of four ones is 2
        give(params, step)
        optimizer.second_step()
        plain_step(plain, own, step)
    assert same_step(base, params, own)
    assert params[0].shape == ()


@pytest.mark.guarantee(id="layouts")
@bases
def test_parameters_that_are_not_contiguous(base: type[torch.optim.Optimizer], backend: str, flatten: bool) -> None:
    """Transposed, channels_last, with gaps (the torch backend's), a slice: trained as their contiguous copies are."""
    generator = torch.Generator().manual_seed(0)
    kinds = [
        normal((5, 3), generator).t(),
        normal((2, 3, 4, 5), generator).to(memory_format=torch.channels_last),
        normal((4, 6), generator)[:, 1:],
        normal((40,), generator)[3:20],
    ]
    if backend != "torch" and not flatten:
        del kinds[2]
    params, own = [nn.Parameter(t) for t in kinds], [nn.Parameter(t.contiguous().clone()) for t in kinds]
    optimizer, plain = (
        SAM(params, base, lr=0.1, backend=backend, flatten=flatten),
        SAM(own, base, lr=0.1, backend=backend, flatten=flatten),
    )
    for step in range(3):
        give(params, step)
        give(own, step)
        optimizer.first_step()
        plain.first_step()
        # the norm is summed in another order
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(params, own, strict=True))
        give(params, 50 + step)
        give(own, 50 + step)
        optimizer.second_step()
        plain.second_step()
    assert same_step(base, params, own)


@pytest.mark.guarantee(id="layouts")
def test_more_than_two_to_the_31_elements_on_the_meta_device() -> None:
    """Sizes, slots and chunks are 64-bit numbers."""
    size = 2**31 + 5
    p = nn.Parameter(torch.empty(size, dtype=torch.bfloat16, device="meta"))
    q = nn.Parameter(torch.empty(7, dtype=torch.bfloat16, device="meta"))
    for parameter in (p, q):
        parameter.grad = torch.empty_like(parameter)
    optimizer = SAM([p, q], lr=0.1)
    (bucket,) = buckets_of(optimizer)
    assert bucket.slots == [0, 2**31 + 32]
    index, _, begin, count, slot = bucket.chunks[-2].tolist()
    assert (index, begin + count, slot) == (0, size, begin)
    assert bucket.chunks[-1].tolist() == [1, 0, 0, 7, 2**31 + 32]
    optimizer.first_step()
    optimizer.second_step()


@pytest.mark.guarantee(id="layouts")
def test_kernels_reach_elements_beyond_two_to_the_31() -> None:
    """The memory is not there until it is used: only the last two chunks are worked on."""
    _cpu = pytest.importorskip("sam_fast._cpu")
    size = 2**31 + CHUNK + 5
    try:
        weight, grad, backup = (torch.empty(size, dtype=torch.float16) for _ in range(3))
    except RuntimeError:
        pytest.skip("needs 12 GiB of address space")
    bucket = backends.BACKENDS["cpu"].bucket([weight], [0])
    last = bucket.chunks[-2:].contiguous()
    assert last[0, 2] >= 2**31
    tail = slice(int(last[0, 2]), size)
    weight[tail], grad[tail] = 1.0, 2.0
    addresses = torch.tensor([weight.data_ptr(), grad.data_ptr(), 0], dtype=torch.int64)
    weights, along, saved = (addresses[i : i + 1].data_ptr() for i in range(3))
    facts = {"dtype": 3, "itemsize": 2, "num_tensors": 1, "num_chunks": 2, "tensors": bucket.tensor_table.data_ptr()}
    facts |= {
        "chunks": last.data_ptr(),
        "weights": weights,
        "along": along,
        "saved": saved,
        "backup": backup.data_ptr(),
    }
    struct = array("q", [facts.get(field, 0) for field in FIELDS])
    at = struct.buffer_info()[0]
    group, partials, norm = (
        torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    _cpu.grad_norm(at, group.data_ptr(), partials.data_ptr(), 1)
    length = (4 * (size - tail.start)) ** 0.5
    assert float(partials.sum().sqrt()) == pytest.approx(length, rel=1e-12)
    _cpu.perturb(at, group.data_ptr(), partials.data_ptr(), 2, 0.0, norm.data_ptr(), None, 1)
    assert torch.equal(weight[tail], torch.full_like(weight[tail], 1.0 + 0.5 * 2.0 / length))
    _cpu.restore(at, True, 1)
    assert torch.equal(weight[tail], torch.ones_like(weight[tail]))


# ---- Hooks and printing ----------------------------------------------------------------------------------------------


def with_hooks(optimizer: torch.optim.Optimizer) -> list[str]:
    """Registers hooks of every kind, two of each, the second in front; the list says in which order they
    were called.
    """
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("step-pre"))
    optimizer.register_step_pre_hook(lambda *_: seen.append("step-pre-2"))
    optimizer.register_step_post_hook(lambda *_: seen.append("step-post"))
    optimizer.register_step_post_hook(lambda *_: seen.append("step-post-2"))
    for name, arguments in (
        ("state_dict_pre", 1),
        ("state_dict_post", 2),
        ("load_state_dict_pre", 2),
        ("load_state_dict_post", 1),
    ):
        register = getattr(optimizer, f"register_{name}_hook")
        for number, prepend in ((1, False), (2, True)):
            text = f"{name}-{number}"
            register(
                (lambda o, text=text: seen.append(text))
                if arguments == 1
                else (lambda o, d, text=text: seen.append(text)),
                prepend=prepend,
            )
    return seen


@pytest.mark.guarantee(id="hooks")
@bases
def test_hooks_run_in_torchs_order(base: type[torch.optim.Optimizer], flatten: bool) -> None:
    params, own = make_params([5]), make_params([5])
    optimizer, plain = SAM(params, base, flatten=flatten, lr=0.1), base(own, lr=0.1)
    seen, expected = with_hooks(optimizer), with_hooks(plain)
    anywhere: list[str] = []
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda o, *_: anywhere.append(f"{type(o).__name__}-pre")),
        torch_optimizer.register_optimizer_step_post_hook(lambda o, *_: anywhere.append(f"{type(o).__name__}-post")),
    ]
    try:
        sam_step(optimizer, params, 0)
        own[0].grad = params[0].grad.clone()  # type: ignore[union-attr]
        plain.step()
    finally:
        for handle in handles:
            handle.remove()
    name = base.__name__
    assert anywhere == ["SAM-pre", "SAM-post", f"{name}-pre", f"{name}-post"]
    optimizer.load_state_dict(optimizer.state_dict())
    plain.load_state_dict(plain.state_dict())
    assert seen == expected
    assert len(seen) == 12


def test_a_hook_that_returns_another_state_dict_is_obeyed() -> None:
    def halved(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "param_groups": [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]}

    optimizer, plain = SAM(make_params([5]), lr=0.8), torch.optim.SGD(make_params([5]), lr=0.8)
    for o in (optimizer, plain):
        o.register_state_dict_post_hook(halved)
        o.register_load_state_dict_pre_hook(halved)
        o.load_state_dict(o.state_dict())
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == 0.2


@pytest.mark.guarantee(id="copies")
@bases
def test_repr_has_every_line_of_the_base_optimizers(base: type[torch.optim.Optimizer]) -> None:
    lines = set(
        repr(SAM([{"params": make_params([3])}, {"params": make_params([2]), "lr": 0.5}], base, lr=0.1)).splitlines()
    )
    own = repr(base([{"params": make_params([3])}, {"params": make_params([2]), "lr": 0.5}], lr=0.1)).splitlines()
    assert set(own[1:]) <= lines


def test_duplicate_parameters_in_a_group_warn_as_in_torch_and_count_once() -> None:
    p = make_params([9])[0]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = SAM([p, p], lr=0.1)
    optimizer.first_step()
    assert float(optimizer.grad_norm) == pytest.approx(float(p.grad.double().norm()), rel=1e-12)  # type: ignore[union-attr]
    optimizer.restore()


@pytest.mark.guarantee(id="copies")
@bases
def test_frozen_then_unfrozen(base: type[torch.optim.Optimizer], backend: str, flatten: bool) -> None:
    """A frozen layer neither moves nor counts; unfrozen it goes on with the state that it had."""
    params, own = make_params([8, 6], grads=False), make_params([8, 6], grads=False)
    optimizer, plain = SAM(params, base, lr=0.1, backend=backend, flatten=flatten), base(own, lr=0.1)
    for step in range(6):
        trained = [0] if 2 <= step < 4 else [0, 1]
        for group in (params, own):
            group[1].requires_grad_(1 in trained)
        optimizer.zero_grad()
        plain.zero_grad()
        frozen = values(params)[1] if len(trained) == 1 else None
        give([params[i] for i in trained], 100 + step)
        optimizer.first_step()
        give([params[i] for i in trained], step)
        give([own[i] for i in trained], step)
        optimizer.second_step()
        plain.step()
        assert frozen is None or same_bits([params[1]], [frozen])
    assert same_step(base, params, own)
