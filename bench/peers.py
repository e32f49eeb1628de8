"""What sam_fast is compared with: other ways to make SAM's step, each with its best legal settings.

All have the two-call interface and are made alike: ``(params, base, rho=, adaptive=, **options of the base)``. Only
:class:`PublicLoop` is not a competitor: it is there to show that ``sam_fast/reference.py`` is no straw man.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Bench, Case, Contender
from bench.machine import installed
from bench.problem import Problem, backward, copies, params_of
from bench.timers import BASELINE_HEAD_START, HEAD_START
from sam_fast import SAM, backends
from sam_fast.reference import ReferenceSAM

OURS = "sam_fast"
REFERENCE, REFERENCE_FUSED = "reference", "reference, fused base"
PEER_LOOP, PEER_FOREACH = "pytorch_optimizer, loop", "pytorch_optimizer, foreach"
FOREACH, COMPILED, PUBLIC_LOOP = "foreach, fused base", "torch.compile of foreach", "public loop"
BEST_PEERS = (PEER_LOOP, PEER_FOREACH, FOREACH)
"""pytorch_optimizer's SAM and the same algorithm with torch._foreach_* and a fused base."""
NORM_ERROR = 0.1
"""How far off a baseline's norm may be. It is PyTorch's, which loses digits where tensors are large; the baseline takes
the same time with them."""


class _Steps:
    def __init__(self, params: Sequence[nn.Parameter], base: Any, rho: float, adaptive: bool, **options: Any) -> None:
        self.base = base(params, **options)
        self.params, self.rho, self.adaptive = list(params), rho, adaptive
        self.param_groups, self.zero_grad = self.base.param_groups, self.base.zero_grad


class PublicLoop(_Steps):
    """The public implementation's two steps, written down from the list of its operations and not from reference.py."""

    @torch.no_grad()
    def first_step(self) -> None:
        lengths = [torch.norm((torch.abs(p) if self.adaptive else 1.0) * p.grad, p=2) for p in self.params]
        scale = self.rho / (torch.norm(torch.stack(lengths), p=2) + 1e-12)
        self.kept = []
        for p in self.params:
            self.kept.append(p.data.clone())
            e = (torch.pow(p, 2) if self.adaptive else 1.0) * p.grad * scale.to(p)
            p.add_(e)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, kept in zip(self.params, self.kept, strict=True):
            p.data = kept
        del self.kept
        self.base.step()


class ForeachSAM(_Steps):
    """SAM with ``torch._foreach_*`` over all parameters at once and a fused base optimizer, as written by someone who
    knows PyTorch well: the backup is allocated once; the perturbation needs one temporary, the scaled gradient."""

    def __init__(self, params: Sequence[nn.Parameter], base: Any, compiled: bool = False, **options: Any) -> None:
        super().__init__(params, base, **options)
        self.backup = [torch.empty_like(p) for p in self.params]
        self.perturb = _foreach_perturb
        if compiled:
            self.perturb = torch.compile(_foreach_perturb, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def first_step(self) -> None:
        weights, gradients = [p.detach() for p in self.params], [p.grad for p in self.params]
        self.perturb(weights, gradients, self.backup, self.rho, self.adaptive)

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.params, self.backup)
        self.base.step()


def _foreach_perturb(params: list[Tensor], grads: list[Any], backup: list[Tensor], rho: float, adaptive: bool) -> None:
    scaled = torch._foreach_mul(torch._foreach_abs(params), grads) if adaptive else grads
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scaled)))
    if adaptive:
        scaled = torch._foreach_mul(scaled, torch._foreach_abs(params))
    torch._foreach_copy_(backup, params)
    torch._foreach_add_(params, torch._foreach_mul(scaled, rho / (norm + 1e-12)))


def _peer(foreach: bool, params: Sequence[nn.Parameter], base: Any, **options: Any) -> Any:
    from pytorch_optimizer import SAM as PeerSAM

    # Its foreach argument goes to the base optimizer too, which takes foreach or fused but not both. None means the
    # loop on a CPU only.
    on_gpu = params[0].device.type != "cpu"
    extra = {"foreach": True} if foreach else {"foreach": False} if on_gpu else {"fused": True}
    return PeerSAM(params, base, **options, **extra)


MAKERS: dict[str, tuple[Callable[..., Any], str]] = {
    OURS: (SAM, ""),  # make_all says which settings
    REFERENCE: (ReferenceSAM, "sam_fast/reference.py, base optimizer with its defaults"),
    REFERENCE_FUSED: (partial(ReferenceSAM, fused=True), "sam_fast/reference.py, base optimizer with fused=True"),
    PEER_LOOP: (partial(_peer, False), "pytorch_optimizer's SAM(fused=True), foreach=False on a GPU"),
    PEER_FOREACH: (partial(_peer, True), "pytorch_optimizer's SAM(foreach=True)"),
    FOREACH: (partial(ForeachSAM, fused=True), "bench/peers.py, torch._foreach_*, base with fused=True"),
    COMPILED: (
        partial(ForeachSAM, compiled=True, fused=True),
        "the same, first_step through torch.compile (fullgraph, static shapes), base with fused=True",
    ),
    PUBLIC_LOOP: (PublicLoop, "bench/peers.py, the public implementation's operations, base with its defaults"),
}
"""Name -> what makes it, and with which settings."""


def make(name: str, problem: Problem, **settings: Any) -> Any:
    """An optimizer on parameters of its own, with these settings besides the problem's."""
    options = {"rho": problem.rho, "adaptive": problem.adaptive, **problem.options, **settings}
    return MAKERS[name][0](copies(problem.start), problem.base, **options)


def steps_of(optimizer: Any, gradients: Sequence[Tensor], head_start: float | None = HEAD_START) -> Contender:
    """first_step and second_step as in a training loop: each finds the gradients of a new backward pass."""
    if head_start == HEAD_START and not isinstance(optimizer, SAM):
        head_start = BASELINE_HEAD_START
    stages = {"first_step": optimizer.first_step, "second_step": optimizer.second_step}
    return Contender(stages, backward(params_of(optimizer), gradients), optimizer.zero_grad, head_start)


def make_all(
    bench: Bench,
    case: Case,
    names: Sequence[str],
    problem: Problem,
    head_start: float | None = HEAD_START,
    **settings: Any,
) -> dict[str, Contender]:
    """Those that can run here, sam_fast with these settings, their results checked once for each case. ``bench`` is
    told about the others."""
    missing: dict[str, str] = {}
    if not installed("pytorch_optimizer"):
        missing |= dict.fromkeys((PEER_LOOP, PEER_FOREACH), "pytorch_optimizer is not installed")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        missing[COMPILED] = "there is no C++ compiler"
    given = ", ".join(f"{key}={value!r}" for key, value in settings.items()) or "default settings"
    backend = backends.choose(problem.start[0], settings.get("backend")).name
    made = {}
    for name in names:
        if name in missing:
            bench.leave_out(f"{name}: {missing[name]}")
            continue
        optimizer = make(name, problem, **(settings if name == OURS else {}))
        if case.id not in bench.checked:
            problem.check(name, optimizer, norm_error=0.0 if name == OURS else NORM_ERROR)
        made[name] = steps_of(optimizer, problem.gradients, head_start)
        made[name].settings = f"SAM, {given}, {backend} backend" if name == OURS else MAKERS[name][1]
    return made
