"""The backends' operations as contenders."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness import Backward, Contender, Problem
from sam_fast import SAM
from sam_fast.backends import GroupOptions


def operation_contenders(optimizer: SAM, problem: Problem | None = None) -> dict[str, Contender]:
    """grad_norm, perturb and restore of the optimizer's one bucket, whose parameters have gradients; checked where ``problem`` is given.

    ``restore_sgd`` and ``restore_adam`` are ``second_step`` itself: what goes on around the kernel is a few microseconds.
    """
    (bucket, partials, sums), *others = optimizer._perturbation._bucket_sums
    assert not others, "one bucket"
    backend, options = bucket.backend, GroupOptions(optimizer.param_groups)
    params = bucket.all_params

    def collect() -> None:
        backend.collect(bucket, options)

    collect()
    backend.grad_norm(bucket, options, partials)
    if problem is not None:
        _check(float(sums.partials.sum().sqrt()), Problem(list(params), adaptive=problem.adaptive).norm())  # where the parameters are now
        before = [p.detach().clone() for p in params]
        backend.perturb(bucket, options, sums.partials, 1e-12, sums.norm)
        assert not all(torch.equal(p, q) for p, q in zip(params, before, strict=True)), "perturb has moved nothing"
        backend.restore(bucket)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)), "restore is not exact, so it is not timed"
        collect()
    gradients: list[Tensor] = [p.grad.clone() for p in params if p.grad is not None]
    backward = Backward(params, gradients)

    def first_step() -> None:
        backward()
        optimizer.first_step()
        optimizer.zero_grad()
        backward()

    step = Contender(optimizer.second_step, prepare=first_step, finish=lambda: (optimizer.zero_grad(), backward()))
    return {
        "grad_norm": Contender(lambda: backend.grad_norm(bucket, options, partials), prepare=collect),
        "perturb": Contender(
            lambda: backend.perturb(bucket, options, sums.partials, 1e-12, sums.norm), prepare=collect, finish=lambda: backend.restore(bucket)
        ),
        "restore": Contender(lambda: backend.restore(bucket, release=False), prepare=lambda: backend.save(bucket)),
        "restore_sgd": step,
        "restore_adam": step,
    }


def _check(got: float, want: float) -> None:
    assert abs(got - want) <= 1e-6 * want, f"the norm is {got}, not {want}, so it is not timed"
