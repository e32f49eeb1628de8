"""What sam_fast is compared with: other ways to make SAM's step, each with its best legal settings.

All have the two-call interface. Only :class:`PublicLoop` is not a competitor: it is there to show that
``sam_fast/reference.py`` is no straw man.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Method, Problem, copies
from sam_fast import SAM, backends
from sam_fast.reference import ReferenceSAM

REFERENCE, REFERENCE_FUSED = "reference", "reference, fused base"
PEER_LOOP, PEER_FOREACH = "pytorch_optimizer, loop", "pytorch_optimizer, foreach"
FOREACH, COMPILED = "foreach, fused base", "torch.compile of foreach"
PUBLIC_LOOP = "public loop"
NORM_ERROR = 0.1
"""How far off a baseline's norm may be.

It is PyTorch's, which loses digits where tensors are large; the baseline takes the same time with them.
"""
BEST_PEERS = (PEER_LOOP, PEER_FOREACH, FOREACH)
"""Issue 4's "best of": pytorch_optimizer's SAM and the same algorithm with torch._foreach_* and a fused base."""


class PublicLoop:
    """The public implementation's two steps, written down from the list of its operations and not from reference.py.

    Per parameter and step: the norm of the gradient (times ``|w|`` if adaptive), stacked and normed again; a copy of
    the weights, the perturbation as a tensor of its own, one addition; then ``p.data`` is the copy again, and the base
    optimizer steps.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        base: type[torch.optim.Optimizer],
        rho: float,
        adaptive: bool,
        **options: Any,
    ) -> None:
        self.base = base(params, **options)
        self.params, self.rho, self.adaptive = list(params), rho, adaptive
        self.kept: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        lengths = []
        for p in self.params:
            if p.grad is not None:
                lengths.append(torch.norm((torch.abs(p) if self.adaptive else 1.0) * p.grad, p=2))
        scale = self.rho / (torch.norm(torch.stack(lengths), p=2) + 1e-12)
        for p in self.params:
            if p.grad is not None:
                self.kept[p] = p.data.clone()
                e = (torch.pow(p, 2) if self.adaptive else 1.0) * p.grad * scale.to(p)
                p.add_(e)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.data = self.kept.pop(p)
        self.base.step()

    def zero_grad(self) -> None:
        self.base.zero_grad()


class ForeachSAM:
    """SAM with ``torch._foreach_*`` over all parameters at once and a fused base optimizer, as written by someone who
    knows PyTorch well.

    The backup is allocated once; the perturbation needs one temporary, the scaled gradient. ``compiled``: both halves
    of first_step go through ``torch.compile``.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        base: type[torch.optim.Optimizer],
        rho: float,
        adaptive: bool,
        compiled: bool = False,
        **options: Any,
    ) -> None:
        self.base = base(params, **options)
        self.params, self.rho, self.adaptive = list(params), rho, adaptive
        self.backup = [torch.empty_like(p) for p in self.params]
        self.perturb = torch.compile(_foreach_perturb, fullgraph=True, dynamic=False) if compiled else _foreach_perturb

    @torch.no_grad()
    def first_step(self) -> None:
        self.perturb(
            [p.detach() for p in self.params], [p.grad for p in self.params], self.backup, self.rho, self.adaptive
        )

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.params, self.backup)
        self.base.step()

    def zero_grad(self) -> None:
        self.base.zero_grad()


def _foreach_perturb(params: list[Tensor], grads: list[Any], backup: list[Tensor], rho: float, adaptive: bool) -> None:
    if adaptive:
        scaled = torch._foreach_mul(torch._foreach_abs(params), grads)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scaled)))
        scaled = torch._foreach_mul(scaled, torch._foreach_abs(params))
    else:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        scaled = grads
    torch._foreach_copy_(backup, params)
    torch._foreach_add_(params, torch._foreach_mul(scaled, rho / (norm + 1e-12)))


# ---- By name ---------------------------------------------------------------------------------------------------------


def sam_fast(problem: Problem, **settings: Any) -> Method:
    params = copies(problem.start)
    said = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    optimizer = SAM(params, problem.base, rho=problem.rho, adaptive=problem.adaptive, **settings, **problem.options)
    backend = backends.choose(params[0], settings.get("backend")).name
    return Method(optimizer, params, f"{f'SAM({said})' if said else 'SAM, default settings'}, {backend} backend")


def _reference(problem: Problem, **extra: Any) -> Method:
    params = copies(problem.start)
    optimizer = ReferenceSAM(
        params, problem.base, rho=problem.rho, adaptive=problem.adaptive, **problem.options, **extra
    )
    return Method(
        optimizer, params, f"sam_fast/reference.py, base optimizer with {'fused=True' if extra else 'its defaults'}"
    )


def _own(cls: Callable[..., Any], problem: Problem, settings: str, **extra: Any) -> Method:
    params = copies(problem.start)
    return Method(
        cls(params, problem.base, problem.rho, problem.adaptive, **extra, **problem.options), params, settings
    )


def _peer(problem: Problem, foreach: bool) -> Method:
    from pytorch_optimizer import SAM as PeerSAM

    params = copies(problem.start)
    on_gpu = params[0].device.type != "cpu"
    # Its foreach argument goes to the base optimizer too, which takes foreach or fused but not both. None means the
    # loop on a CPU only.
    extra: dict[str, Any] = {"foreach": True} if foreach else {"foreach": False} if on_gpu else {"fused": True}
    optimizer = PeerSAM(params, problem.base, rho=problem.rho, adaptive=problem.adaptive, **problem.options, **extra)
    said = ", ".join(f"{name}={value}" for name, value in extra.items())
    return Method(
        optimizer, params, f"pytorch_optimizer {importlib.metadata.version('pytorch_optimizer')}, SAM({said})"
    )


MAKERS: dict[str, Callable[[Problem], Method]] = {
    REFERENCE: _reference,
    REFERENCE_FUSED: lambda problem: _reference(problem, fused=True),
    PEER_LOOP: lambda problem: _peer(problem, foreach=False),
    PEER_FOREACH: lambda problem: _peer(problem, foreach=True),
    FOREACH: lambda problem: _own(
        ForeachSAM, problem, "bench/peers.py, torch._foreach_*, base with fused=True", fused=True
    ),
    COMPILED: lambda problem: _own(
        ForeachSAM,
        problem,
        "the same, first_step through torch.compile (fullgraph, static shapes), base with fused=True",
        compiled=True,
        fused=True,
    ),
    PUBLIC_LOOP: lambda problem: _own(
        PublicLoop, problem, "bench/peers.py, the public implementation's operations, base with its defaults"
    ),
}


def unavailable(name: str) -> str | None:
    """Why a baseline cannot run here, or None."""
    if name in (PEER_LOOP, PEER_FOREACH) and importlib.util.find_spec("pytorch_optimizer") is None:
        return "pytorch_optimizer is not installed"
    return None


def make(names: Sequence[str], problem: Problem) -> tuple[dict[str, Method], list[str]]:
    """The baselines that can run here and have the right result, by name, and for each other one why it
    does not run.
    """
    methods: dict[str, Method] = {}
    left_out = []
    for name in names:
        reason = unavailable(name)
        if reason is None:
            method = MAKERS[name](problem)
            try:
                problem.check(name, method, NORM_ERROR)
            except Exception as error:
                if name != COMPILED:
                    raise
                reason = f"does not compile or run here: {type(error).__name__}: {str(error).splitlines()[0]}"
            else:
                methods[name] = method
        if reason is not None:
            left_out.append(f"{name}: {reason}")
    return methods, left_out
