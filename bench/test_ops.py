"""Each operation by itself, per dtype and (with --full) backend: GB/s of the bytes that must move."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from bench import peers
from bench.harness import CACHES, Bench, Contender, Plan, usable
from bench.models import SHAPES
from bench.problem import Method, Problem, backward, copies, make_params
from bench.records import TORCH_COPY
from bench.test_steps import BASES, DTYPES
from bench.timers import OURS
from sam_fast import BatchNormSnapshot, backends

BYTES_PER_ELEMENT = {"grad_norm": 4, "perturb": 16, "restore": 8, "step_sgd": 20, "step_adam": 28}
"""Bytes that must move per float32 element: norm reads g; perturb reads w and g, writes w and the backup; restore
copies; step_sgd, which restores and steps in one, reads backup, g and momentum and writes w and momentum; step_adam the
same with two moments."""
STATE = {"step_sgd": {"momentum_buffer"}, "step_adam": {"step", "exp_avg", "exp_avg_sq"}}
"""What the base optimizer keeps of each parameter, which the bytes of the operation include."""
DEFAULT_SHAPES = {"cpu": "resnet50", "cuda": "vit_base_patch16_224"}
"""A GPU's cache holds a good part of resnet50."""


def operation(op: str, problem: Problem, backend: str, check: bool = True) -> Contender:
    """grad_norm, perturb or restore of one bucket, whose tensors have gradients. A wrong result is not timed."""
    params = copies(problem.start)
    backward(params, problem.gradients)()
    bucket = backends.choose(params[0], backend).bucket(params, [0] * len(params))
    group = {"rho": problem.rho, "eta": 0.0, "adaptive": problem.adaptive, "perturb": True}
    options = backends.GroupOptions([group])
    partials = torch.zeros(bucket.num_partials, dtype=torch.float64, device=params[0].device)
    collect, grad_norm = partial(bucket.collect, options), partial(bucket.grad_norm, options, partials)
    perturb = partial(bucket.perturb, options, partials, 1e-12, partials.new_zeros(()))
    collect()
    grad_norm()
    if check:
        got, wanted = float(partials.sum().sqrt()), problem.norm
        assert abs(got - wanted) <= 1e-6 * wanted, f"the norm is {got}, not {wanted}, so it is not timed"
        perturb()
        problem.check_perturbed("perturb", params)
        bucket.restore()
        exact = all(torch.equal(p, q) for p, q in zip(params, problem.start, strict=True))
        assert exact, "restore is not exact, so it is not timed"
    return {
        "grad_norm": Contender(grad_norm, prepare=collect, head_start=OURS),
        "perturb": Contender(perturb, prepare=collect, finish=bucket.restore, head_start=OURS),
        "restore": Contender(partial(bucket.restore, release=False), prepare=bucket.save, head_start=OURS),
    }[op]


def second_step(op: str, problem: Problem, method: Method, check: bool = True) -> Contender:
    """step_sgd or step_adam, restore and step in one, is ``second_step`` itself, checked with the whole step: what goes
    on around the kernel takes a few microseconds, on a GPU before it starts."""
    optimizer, make_gradients = method.optimizer, backward(method.params, problem.gradients)
    kept = {name for p in method.params for name, value in optimizer.state[p].items() if value is not None}
    assert not check or kept == STATE[op], f"{op} was to be timed, but the base optimizer keeps {kept}"

    def first_step() -> None:
        make_gradients()
        optimizer.first_step()
        optimizer.zero_grad()
        make_gradients()

    return Contender(optimizer.second_step, prepare=first_step, finish=optimizer.zero_grad, head_start=OURS)


def torch_copy(start: list[nn.Parameter]) -> Contender:
    """What does not change with this project: Tensor.copy_ of the same weights."""
    targets = [torch.empty_like(p) for p in start]

    def run() -> None:
        for target, p in zip(targets, start, strict=True):
            target.copy_(p.detach())

    return Contender(run)


def op_cases() -> Iterator[Any]:
    for op, dtype, shapes, adaptive in itertools.product(BYTES_PER_ELEMENT, DTYPES, SHAPES, (False, True)):
        # float16 holds no second moment of such gradients: it is 0, and the step, torch's too, is not finite
        if (op, dtype) == ("step_adam", "float16") or (adaptive and op not in ("grad_norm", "perturb")):
            continue
        default = dtype == "float32" or (dtype == "bfloat16" and op in ("perturb", "step_sgd") and not adaptive)
        full = [kind for kind, chosen in DEFAULT_SHAPES.items() if shapes != chosen or not default]
        name = f"{op}{', adaptive' if adaptive else ''}-{dtype}-{shapes}"
        yield pytest.param(op, dtype, shapes, adaptive, id=name, marks=[pytest.mark.full(*full)] if full else [])


@pytest.mark.parametrize(("op", "dtype", "shapes", "adaptive"), op_cases())
def test_op(bench: Bench, op: str, dtype: str, shapes: str, adaptive: bool) -> None:
    base, options, _ = BASES["AdamW" if op == "step_adam" else "SGD"]
    start = make_params(SHAPES[shapes], DTYPES[dtype], bench.device)
    problem = Problem(start, base, options, rho=0.5 if adaptive else 0.05, adaptive=adaptive)
    names = usable(bench.device) if bench.full or bench.machine.gpu else usable(bench.device)[:1]
    contenders: dict[str, Contender] = {}
    first = bench.case not in bench.checked
    for name in names:
        if op in STATE:
            method = peers.make(peers.OURS, problem, backend=name)
            bench.check(problem, {name: method})
            contenders[name] = second_step(op, problem, method, first)
        else:
            contenders[name] = operation(op, problem, name, first)
    contenders[TORCH_COPY] = torch_copy(start)
    # perturb reads the weights anyway; an adaptive norm reads them too.
    per_element = BYTES_PER_ELEMENT[op] + (4 if adaptive and op == "grad_norm" else 0)
    # On a CPU these leave nothing unwritten in the caches: one reads, the other's stores go past them.
    caches = 3 if op in ("grad_norm", "restore") and bench.device == "cpu" else CACHES
    bench.run(
        f"op {op}{', adaptive' if adaptive else ''}",
        f"{shapes} {dtype}",
        contenders,
        elements=problem.elements,
        bytes_moved=per_element * problem.elements * DTYPES[dtype].itemsize // 4,
        plan=Plan(seconds=0.5, rounds=(4, 12)),
        caches=caches,
    )


@pytest.mark.parametrize("layers", [1, 53, 500])
def test_batchnorm_snapshot(bench: Bench, layers: int) -> None:
    """save + restore of all running statistics; loops over the buffers are the baselines."""
    model = nn.Sequential(*(nn.BatchNorm1d(64) for _ in range(layers))).to(bench.device)
    snapshot, buffers = BatchNormSnapshot(model), list(model.buffers())
    for b in buffers:
        b.copy_(torch.rand(b.shape) * 100)
    before = [b.clone() for b in buffers]
    snapshot.save()
    torch._foreach_zero_(buffers)
    snapshot.restore()
    assert all(torch.equal(a, b) for a, b in zip(before, buffers, strict=True))

    def run() -> None:
        snapshot.save()
        snapshot.restore()

    def loop() -> None:
        saved = [b.clone() for b in buffers]
        for b, old in zip(buffers, saved, strict=True):
            b.copy_(old)

    def foreach() -> None:
        torch._foreach_copy_(before, buffers)
        torch._foreach_copy_(buffers, before)

    contenders = {"sam_fast": Contender(run, head_start=OURS), "loop over buffers": Contender(loop)}
    contenders["foreach"] = Contender(foreach)
    group, plan = "BatchNorm snapshot, save + restore", Plan(0.4, (15, 80))
    bench.run(group, f"{layers} layers", contenders, elements=129 * layers, plan=plan)
