"""The native code from outside: what Python refuses, and what kernels must not do."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import make_params, normal, same_bits, values
from model_of_sam import perturbed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sam_fast import SAM, BatchNormSnapshot

_cpu = pytest.importorskip("sam_fast._cpu")
CSRC = Path(__file__).parent.parent / "csrc"
EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


# ---- Fuzzing what comes in -------------------------------------------------------------------------------------------

NO_TENSORS: list[Any] = [
    None,
    1,
    2.5,
    "tensor",
    b"tensor",
    [],
    {},
    object(),
    Tensor,
    torch.float32,
    array("Q", [0]),
    torch.Size([2]),
]


def gather(tensors: Any) -> Any:
    """A gatherer whose parameters are the tensors, all in one group."""
    return _cpu.Gather(EXCHANGE, Tensor, tensors, tensors, [0] * len(tensors) if isinstance(tensors, list) else [])


REFUSED = (TypeError, RuntimeError, ValueError, BufferError)


@pytest.mark.guarantee(id="wrong-arguments")
def test_nothing_but_tensors_is_taken_for_one() -> None:
    """Whatever is passed where tensors belong is an exception, never a crash."""
    one = [torch.ones(2)]
    for bad in NO_TENSORS:
        for tensors in (bad, [bad], [torch.ones(2), bad]):
            if tensors != []:
                with pytest.raises(REFUSED):
                    gather(tensors)
        for arguments in (
            (bad, Tensor, one, one, [0]),
            (EXCHANGE, Tensor, one, [bad], [0]),
            (EXCHANGE, Tensor, one, one, [bad]),
        ):
            if bad not in (1, torch.Size([2])) or arguments[-1] != [bad]:
                with pytest.raises(REFUSED):
                    _cpu.Gather(*arguments)
    for odd in (torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")):
        with pytest.raises(RuntimeError):
            gather([odd])
    with pytest.raises(ValueError, match="same length"):
        _cpu.Gather(EXCHANGE, Tensor, one, one, [])


@pytest.mark.parametrize("bad", NO_TENSORS, ids=lambda bad: type(bad).__name__)
def test_nothing_but_columns_is_written_to(bad: Any) -> None:
    """A column is a writable buffer with one 64-bit number per tensor; what is read is a list, a dict or a tuple."""
    found, good = gather([torch.ones(2)]), array("Q", [0])
    masks = array("Q", [3])
    calls: list[Any] = [lambda: found.read(bad, good), lambda: found.states(bad, ("m",), masks, (good,))]
    if not isinstance(bad, array):
        calls += [lambda: found.weights(bad), lambda: found.collect(bad, good), lambda: found.collect(good, bad)]
        calls += [lambda: found.read([None], bad), lambda: found.counters({}, "step", 1, masks, bad)]
        calls += [lambda: found.states({}, ("m",), masks, (bad,)), lambda: found.states({}, ("m",), masks, bad)]
    if bad == {} or (isinstance(bad, list) and not bad):
        calls = calls[2:]
    for call in calls:
        with pytest.raises(REFUSED):
            call()


@pytest.mark.parametrize("size", [0, 2, 9])
def test_a_column_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="one 64-bit number"):
        gather([torch.ones(2)]).weights(array("Q", bytes(8 * size)))


NO_ADDRESSES = [(), (0,), ("f32",) * 4, (None,) * 4, (0, -1, 1, 1), (0, 2**64, 1, 1), (0, 1.5, 1, 1)]


@pytest.mark.guarantee(id="wrong-arguments")
@pytest.mark.parametrize("arguments", NO_ADDRESSES)
def test_arguments_that_are_no_addresses_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        _cpu.grad_norm(*arguments)


@pytest.mark.parametrize("index", [-1, len(_cpu.steps)])
def test_a_step_that_does_not_exist_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match="there is no step"):
        _cpu.step(index, 0, 0, 1.0, None, 1)


def mutations(rng: random.Random) -> list[Any]:
    """Ways in which a parameter or a gradient may differ from what it was when the buckets were built."""

    def data(change: Any) -> Any:
        def apply(p: nn.Parameter) -> None:
            p.data = change(p.detach())

        return apply

    def grad(change: Any) -> Any:
        def apply(p: nn.Parameter) -> None:
            p.grad = None
            g = normal(p.shape, torch.Generator().manual_seed(rng.randrange(99))).to(p.dtype)
            wanted = change(g)
            if (wanted.shape, wanted.dtype) == (p.shape, p.dtype):
                p.grad = wanted
            else:  # as .data can, behind autograd's checks
                p.grad = g
                p.grad.data = wanted

        return apply

    def free(p: nn.Parameter) -> None:
        """The old memory is freed and reused at once."""
        shape = p.shape
        p.data = torch.zeros(1, dtype=p.dtype).expand(shape).contiguous()
        p.data = p.detach().clone()

    return [
        data(lambda t: t.double()),
        data(lambda t: t.half()),
        data(lambda t: t.bfloat16()),
        data(lambda t: t.clone()),
        data(lambda t: t.reshape(t.shape[0], -1).t().contiguous().t().reshape(t.shape)),
        data(lambda t: torch.stack([t, t], -1)[..., 0]),
        data(lambda t: t[: max(1, len(t) // 2)]),
        data(lambda t: torch.cat([t, t])),
        data(lambda t: t.new_empty((0, *t.shape[1:]))),
        data(lambda t: t.unsqueeze(0)),
        data(lambda t: t[:1].expand_as(t)),
        grad(lambda g: torch.stack([g, g], -1)[..., 0]),
        grad(lambda g: g[:1].expand_as(g)),
        grad(lambda g: g.double()),
        grad(lambda g: g.half()),
        grad(lambda g: g[:1]),
        grad(lambda g: g.to_sparse()),
        grad(lambda g: g.flatten()),
        lambda p: setattr(p, "grad", None),
        free,
    ]


@pytest.mark.guarantee(id="gradient-layout")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_parameters_changed_at_random_are_served_or_refused(base: type[torch.optim.Optimizer]) -> None:
    """Before first_step, between the passes and before second_step.

    What is not refused is perturbed by the formula, and the others keep their bits.
    """
    for seed in range(80):
        rng = random.Random(seed)
        params = [nn.Parameter(t.detach().reshape(-1, 1)) for t in make_params([40, 17, 130], seed=seed, grads=False)]
        for p in params:
            p.grad = normal(p.shape, torch.Generator().manual_seed(seed))
        optimizer = SAM(params, base, lr=0.1)
        victim, when = params[rng.randrange(3)], rng.randrange(3)
        others = [p for p in params if p is not victim]
        change = rng.choice(mutations(rng))
        if when == 0:
            change(victim)
        began, kept = values(params), values(others)
        try:
            sensible = all(p.grad is None or (p.grad.shape == p.shape and not p.grad.is_sparse) for p in params)
            # A gradient is brought to its parameter's dtype.
            precision = (
                1e-6 if all(p.grad is None or p.grad.element_size() <= p.element_size() for p in params) else 1e-2
            )
            norm, expected = perturbed(optimizer, 1e-12) if sensible else (0.0, [])
            optimizer.first_step()
            assert sensible
            assert float(optimizer.grad_norm) == pytest.approx(norm, rel=precision)
            for p, w in expected:
                assert torch.allclose(p.double(), w, rtol=1e-2 if p.element_size() == 2 else 1e-5, atol=1e-5)
            if when == 1:
                change(victim)
            optimizer.restore()
            assert same_bits(others, kept)
            assert victim.shape != began[params.index(victim)].shape or torch.allclose(
                victim.double(), began[params.index(victim)].double(), rtol=1e-2, atol=1e-3
            )
            optimizer.first_step()
            if when == 2:
                change(victim)
            optimizer.second_step()
        except (RuntimeError, IndexError, TypeError):
            try:
                optimizer.restore()
            except RuntimeError as again:
                assert "shape" in str(again)  # noqa: PT017 - it may also succeed
            assert same_bits(others, kept) or when == 2
        assert not optimizer.perturbed


@pytest.mark.guarantee(id="wrong-arguments")
@pytest.mark.parametrize("flatten", [False, True])
def test_memory_that_a_fake_tensor_mode_withholds_is_missed(flatten: bool) -> None:
    """Its tensors have the address 0. Outside of it everything goes on."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.randn(4, 3)
    optimizer = SAM(model.parameters(), flatten=flatten, lr=0.1)
    model(x).square().sum().backward()
    before, other = values(model.parameters()), [torch.ones(3, requires_grad=True)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for use in (lambda: SAM(other, flatten=flatten), BatchNormSnapshot(model).save):
            with pytest.raises(RuntimeError, match="outside FakeTensorMode"):
                use()
        with pytest.raises(RuntimeError, match="outside FakeTensorMode"):
            optimizer.first_step()
    assert same_bits(before, values(model.parameters()))
    optimizer.first_step()
    optimizer.restore()
    assert same_bits(before, values(model.parameters()))


@pytest.mark.guarantee(id="taken-memory")
def test_memory_of_a_deleted_parameter_is_not_used() -> None:
    """The optimizer keeps its parameters alive; their gradients and old memory are looked up anew in every step."""
    params = make_params([1000, 1000], grads=False)
    optimizer = SAM(params, lr=0.1, momentum=0.9)
    for step in range(20):
        for p in params:
            p.data = p.detach().clone()
            p.grad = normal(p.shape, torch.Generator().manual_seed(step))
        strangers = [torch.full((1000,), 7.0) for _ in range(8)]  # where the old memory was, perhaps
        optimizer.first_step(zero_grad=True)
        for p in params:
            p.grad = normal(p.shape, torch.Generator().manual_seed(step))
        strangers += [torch.full((1000,), 7.0) for _ in range(8)]
        optimizer.second_step(zero_grad=True)
        assert all(bool((s == 7.0).all()) for s in strangers)


# ---- Inside the kernels ----------------------------------------------------------------------------------------------

KERNELS = ["grad_norm", "perturb", "copy", "step"]


@pytest.mark.guarantee(id="no-allocation")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_do_not_know_python(kernel: str) -> None:
    """They include nothing of Python's, so no call into it is possible; and the bindings release its lock around
    them.
    """
    command = ["g++", "-std=c++17", "-MM", "-DSAM_ISA=baseline", "-DSAM_STEP=Sgd", str(CSRC / "cpu" / f"{kernel}.cpp")]
    included = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "kernels.h" in included
    for header in ("Python.h", "pybind11", "torch"):
        assert header not in included.replace(str(CSRC), "")
    text = (CSRC / "cpu" / "bindings.cpp").read_text()
    call = text.index({"copy": "active->backup(", "step": "active->steps["}.get(kernel, f"active->{kernel}("))
    assert "py::gil_scoped_release release;" in text[text.rindex("m.def(", 0, call) : call]


COUNTER = """
# define _GNU_SOURCE
# include <dlfcn.h>
# include <stddef.h>
static _Atomic long count = 0;
static void *(*real)(size_t) = 0;
long allocations(void) { return count; }
void *malloc(size_t n) {
  if (!real) real = (void *(*)(size_t))dlsym(RTLD_NEXT, "malloc");
  count++;
  return real(n);
}
"""

COUNTING = """
import ctypes, sys
import torch
from sam_fast import SAM, BatchNormSnapshot
allocations = ctypes.CDLL(sys.argv[1]).allocations
allocations.restype = ctypes.c_long

def during(base, numel, **options):
    p = torch.nn.Parameter(torch.ones(numel))
    optimizer = SAM([p], base, lr=0.1, backend="cpu", **options)
    p.grad = torch.ones(numel)
    counts = []
    for _ in range(4):
        before = allocations()
        optimizer.first_step()
        optimizer.second_step()
        counts.append(allocations() - before)
    return min(counts[2:])

torch.set_num_threads(1)
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
for base, options in ((SGD, {"momentum": 0.9}), (AdamW, {}), (SGD, {"adaptive": True})):
    few, many = (during(base, numel, **options) for numel in (10, 64 * 16384 + 5))
    assert few == many, (base, few, many)
before = allocations()
keep = [bytearray(100_000) for _ in range(10)]
assert allocations() - before >= 10  # it does count
print("fine")
"""


@pytest.mark.guarantee(id="no-allocation")
@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler and Linux")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer counts allocations itself")
def test_no_kernel_allocates_in_its_loop(tmp_path: Path) -> None:
    """A step over 65 chunks calls malloc as often as one over 10 elements (for Adam's bias corrections, one
    number a tensor, and for Python's own objects).
    """
    (tmp_path / "counter.c").write_text(COUNTER)
    library = tmp_path / "counter.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", str(tmp_path / "counter.c"), "-o", str(library), "-ldl"], check=True
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, str(library)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout == "fine\n", done.stderr
