"""Each operation by itself, per dtype and (with --full) backend: GB/s of the bytes that must move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.clock import OURS
from bench.harness import (
    BYTES_PER_ELEMENT,
    Backward,
    Bench,
    Contender,
    Method,
    Plan,
    Problem,
    check_close,
    copies,
    make_params,
    usable,
)
from bench.records import TORCH_COPY
from bench.shapes import SHAPES
from bench.test_optimizer_step import BASES, DTYPES
from sam_fast import SAM, BatchNormSnapshot
from sam_fast.backends import GroupOptions

OPS = ["grad_norm", "perturb", "restore", "step_sgd", "step_adam"]
STATE = {"step_sgd": {"momentum_buffer"}, "step_adam": {"step", "exp_avg", "exp_avg_sq"}}
"""What the base optimizer keeps of each parameter, which the bytes of the operation include."""


def contender_of(op: str, optimizer: SAM, problem: Problem) -> Contender:
    """An operation on the optimizer's one bucket, whose parameters have gradients. A wrong result is not timed.

    ``step_sgd`` and ``step_adam``, restore and step in one, are ``second_step`` itself, checked with the whole step:
    what goes on around the kernel takes a few microseconds, on a GPU before it starts.
    """
    (bucket, partials, sums), *others = optimizer._perturbation.norm.parts
    assert not others, "one bucket"
    options = GroupOptions(optimizer.param_groups)
    params = list(bucket.all_params)

    def collect() -> None:
        bucket.collect(options)

    def perturb() -> None:
        bucket.perturb(options, sums.partials, 1e-12, sums.norm)

    collect()
    bucket.grad_norm(options, partials)
    # the parameters have moved since problem was made
    here = Problem(params, rho=problem.rho, adaptive=problem.adaptive)
    norm, wanted = float(sums.partials.sum().sqrt()), here.norm()
    assert abs(norm - wanted) <= 1e-6 * wanted, f"the norm is {norm}, not {wanted}, so it is not timed"
    before, wanted_params = [p.detach().clone() for p in params], here.perturbed
    perturb()
    check_close("perturb", params, wanted_params, 0.0)
    bucket.restore()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)), (
        "restore is not exact, so it is not timed"
    )
    if op == "grad_norm":
        return Contender(lambda: bucket.grad_norm(options, partials), prepare=collect, head_start=OURS)
    if op == "perturb":
        return Contender(perturb, prepare=collect, finish=lambda: bucket.restore(), head_start=OURS)
    if op == "restore":
        return Contender(lambda: bucket.restore(release=False), prepare=lambda: bucket.save(), head_start=OURS)
    kept = {name for p in params for name, value in optimizer.state[p].items() if value is not None}
    assert kept == STATE[op], f"{op} was to be timed, but the base optimizer keeps {kept}"
    backward = Backward(params, [p.grad.clone() for p in params if p.grad is not None])

    def first_step() -> None:
        backward()
        optimizer.first_step()
        optimizer.zero_grad()
        backward()

    return Contender(
        optimizer.second_step, prepare=first_step, finish=lambda: (optimizer.zero_grad(), backward()), head_start=OURS
    )


def torch_copy(start: list[nn.Parameter]) -> Contender:
    """What does not change with this project: Tensor.copy_ of the same weights."""
    targets = [torch.empty_like(p) for p in start]

    def run() -> None:
        for target, p in zip(targets, start, strict=True):
            target.copy_(p.detach())

    return Contender(run)


DEFAULT_SHAPES = {"cpu": "resnet50", "cuda": "vit_base_patch16_224"}
"""A GPU's cache holds a good part of resnet50."""


def op_cases() -> list[Any]:
    cases = []
    for op in OPS:
        for dtype in DTYPES:
            if (op, dtype) == ("step_adam", "float16"):
                # float16 holds no second moment of such gradients: it is 0, and the step, torch's too, is not finite
                continue
            for shapes in SHAPES:
                for adaptive in (False, True) if op in ("grad_norm", "perturb") else (False,):
                    default = dtype == "float32" or (
                        dtype == "bfloat16" and op in ("perturb", "step_sgd") and not adaptive
                    )
                    full = [kind for kind, chosen in DEFAULT_SHAPES.items() if shapes != chosen or not default]
                    name = f"{op}{', adaptive' if adaptive else ''}-{dtype}-{shapes}"
                    cases.append(
                        pytest.param(
                            op, dtype, shapes, adaptive, id=name, marks=[pytest.mark.full(*full)] if full else []
                        )
                    )
    return cases


@pytest.mark.parametrize(("op", "dtype", "shapes", "adaptive"), op_cases())
def test_op(bench: Bench, op: str, dtype: str, shapes: str, adaptive: bool) -> None:
    base, options, _ = BASES["AdamW" if op == "step_adam" else "SGD"]
    start = make_params(SHAPES[shapes], dtype=DTYPES[dtype], device=bench.device)
    problem = Problem(start, base, options, rho=0.5 if adaptive else 0.05, adaptive=adaptive)
    names = usable(bench.device) if bench.full or bench.machine.gpu else usable(bench.device)[:1]
    contenders: dict[str, Contender] = {}
    gradients: list[Tensor] = problem.gradients()
    for name in names:
        params = copies(start)
        optimizer = SAM(params, base, rho=problem.rho, adaptive=adaptive, backend=name, **options)
        problem.check(name, Method(optimizer, params))
        Backward(params, gradients)()
        contenders[name] = contender_of(op, optimizer, problem)
    contenders[TORCH_COPY] = torch_copy(start)
    # grad_norm and perturb read the weights anyway or not at all: an adaptive norm reads them too.
    per_element = BYTES_PER_ELEMENT[op] + (4 if adaptive and op == "grad_norm" else 0)
    bench.run(
        f"op {op}{', adaptive' if adaptive else ''}",
        f"{shapes} {dtype}",
        contenders,
        elements=problem.elements,
        bytes_moved=per_element * problem.elements * DTYPES[dtype].itemsize // 4,
        plan=Plan(seconds=1.5, rounds=(11, 40)),
    )


@pytest.mark.parametrize("layers", [1, 53, 500])
def test_batchnorm_snapshot(bench: Bench, layers: int) -> None:
    """save + restore of all running statistics; loops over the buffers are the baselines."""
    model = nn.Sequential(*(nn.BatchNorm1d(64) for _ in range(layers))).to(bench.device)
    snapshot = BatchNormSnapshot(model)
    buffers = list(model.buffers())
    for b in buffers:
        b.copy_(torch.rand(b.shape) * 100)

    def run() -> None:
        snapshot.save()
        snapshot.restore()

    before = [b.clone() for b in buffers]
    snapshot.save()
    for b in buffers:
        b.fill_(3)
    snapshot.restore()
    assert all(torch.equal(a, b) for a, b in zip(before, buffers, strict=True))

    def loop() -> None:
        saved = [b.clone() for b in buffers]
        for b, old in zip(buffers, saved, strict=True):
            b.copy_(old)

    kept = [torch.empty_like(b) for b in buffers]

    def foreach() -> None:
        torch._foreach_copy_(kept, buffers)
        torch._foreach_copy_(buffers, kept)

    contenders = {
        "sam_fast": Contender(run, head_start=OURS),
        "loop over buffers": Contender(loop),
        "foreach": Contender(foreach),
    }
    bench.run(
        "BatchNorm snapshot, save + restore",
        f"{layers} layers",
        contenders,
        elements=129 * layers,
        plan=Plan(1.5, (50, 300)),
    )
