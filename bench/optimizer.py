"""The whole optimizer step, its two halves, and its operations one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.contenders import NORM_ERROR, OURS, SHAPES, Problem, make, make_params, params_of
from bench.harness import HEAD_START, LONG_HEAD_START, WORK, Bench, Case, Contender
from bench.records import TORCH_COPY
from sam_fast import backends

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], int]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}, 20),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 1e-2}, 28),
}
"""Name -> class, options, and the bytes per float32 element that second_step must move: backup, gradient and momentum
in, weights and momentum out; AdamW has two moments."""


def problem_of(bench: Bench, case: Case, base: str = "SGD", dtype: str = "float32", adaptive: bool = False) -> Problem:
    """On the shapes that a case's name begins with."""
    start = make_params(SHAPES[case.name.partition(", ")[0]], getattr(torch, dtype), bench.device)
    return Problem(start, *BASES[base][:2], rho=0.5 if adaptive else 0.05, adaptive=adaptive)


def optimizer_step(
    bench: Bench,
    case: Case,
    contenders: Sequence[str],
    base: str = "SGD",
    dtype: str = "float32",
    adaptive: bool = False,
    method: str = WORK,
    **settings: Any,
) -> None:
    """Each step with the gradients of a new backward pass. ``settings`` are sam_fast's."""
    if (backend := settings.get("backend")) not in (None, *usable(bench.device)):
        return bench.leave_out(f"{case.group}: the {backend} backend cannot be used here")
    problem = problem_of(bench, case, base, dtype, adaptive)
    made = {}
    for name in contenders:
        try:
            optimizer = make(name, problem, **(settings if name == OURS else {}))
        except ModuleNotFoundError as error:
            bench.leave_out(f"{name}: {error}")
            continue
        if case.id not in bench.checked:
            problem.check(name, optimizer, norm_error=0.0 if name == OURS else NORM_ERROR)
        stages = {"first_step": optimizer.first_step, "second_step": optimizer.second_step}
        gradients = problem.backward(params_of(optimizer))
        head_start = HEAD_START if name == OURS and settings.get("backend") != "torch" else LONG_HEAD_START
        made[name] = Contender(stages, gradients, optimizer.zero_grad, method, head_start)
    size = problem.elements * problem.start[0].element_size() // 4
    # norm: g; perturb: w and g in, w and the backup out. The norm of an adaptive group reads the weights too.
    moved = {"first_step": (24 if adaptive else 20) * size, "second_step": BASES[base][2] * size}
    bench.run(case, made, problem.elements, moved, total="optimizer step")


def operations(bench: Bench, case: Case, dtype: str = "float32", adaptive: bool = False) -> None:
    """Those of a bucket by itself, on each backend. Restoring and stepping in one is second_step."""
    problem = problem_of(bench, case, "SGD", dtype, adaptive)
    check = case.id not in bench.checked
    contenders = {backend: operations_of(problem, backend, check) for backend in usable(bench.device)}
    weights = [p.detach() for p in problem.start]
    copy = partial(torch._foreach_copy_, list(map(torch.empty_like, weights)), weights)  # no part of this project
    size = problem.elements * problem.start[0].element_size()
    moved = {"grad_norm": (2 if adaptive else 1) * size, "perturb": 4 * size, "restore": 2 * size}
    contenders[TORCH_COPY] = Contender(dict.fromkeys(moved, copy))
    bench.run(case, contenders, problem.elements, moved)


def operations_of(problem: Problem, backend: str, check: bool = True) -> Contender:
    """One bucket's, whose tensors have gradients. A wrong result is not timed."""
    params = problem.params()
    problem.backward(params)()
    bucket = backends.choose(params[0], backend).bucket(params, [0] * len(params))
    group = {"rho": problem.rho, "eta": 0.0, "adaptive": problem.adaptive, "perturb": True}
    options = backends.GroupOptions([group])
    partials = torch.zeros(bucket.num_partials, dtype=torch.float64, device=params[0].device)
    stages = {
        "grad_norm": partial(bucket.grad_norm, options, partials),
        "perturb": partial(bucket.perturb, options, partials, 1e-12, partials.new_zeros(())),
        "restore": partial(bucket.restore, release=False),
    }
    collect = partial(bucket.collect, options)
    if check:
        collect()
        stages["grad_norm"]()
        got, wanted = float(partials.sum().sqrt()), problem.norm
        assert abs(got - wanted) <= 1e-6 * wanted, f"the norm is {got}, not {wanted}, so it is not timed"
        stages["perturb"]()
        problem.check_perturbed("perturb", params)
        stages["restore"]()
        exact = all(torch.equal(p, q) for p, q in zip(params, problem.start, strict=True))
        assert exact, "restore is not exact, so it is not timed"
    return Contender(stages, collect, head_start=LONG_HEAD_START if backend == "torch" else HEAD_START)


def usable(device: str) -> list[str]:
    """Backends that take this device's tensors, the preferred one first."""
    probe = torch.zeros(16, device=device)
    able = ((name, backends.BACKENDS[name]) for name in backends.available())
    names = [name for name, backend in able if not (backend.rejects(probe) or backend.unusable_on(probe.device))]
    return sorted(names, key=lambda name: name != backends.choose(probe).name)
