"""What is compared: sam_fast and other ways to make SAM's step, all with the two-call interface; the parameters that
every one is given; and the check that none is timed whose result is wrong.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam_fast import SAM
from sam_fast.reference import ReferenceSAM

MODELS: dict[str, list[list[int]]] = json.loads((Path(__file__).parent / "model_shapes.json").read_text())
TINY, LARGEST = "10,000 tensors of 16", "gpt2"
BY_ELEMENTS = {f"1e{n} in 100": [[10**n // 100]] * 100 for n in range(4, 8)}
BY_TENSORS = {f"1e6 in {10**n}": [[10 ** (6 - n)]] * 10**n for n in range(4)}
OF_EIGHT = {f"{count} x 8": [[8]] * count for count in (1, 161)}
SHAPES: dict[str, list[list[int]]] = {**MODELS, TINY: [[16]] * 10_000, **OF_EIGHT, **BY_ELEMENTS, **BY_TENSORS}
LARGE = [name for name, shapes in MODELS.items() if sum(map(math.prod, shapes)) >= 25_000_000]
"""Models that no cache holds: their bandwidth is the memory's."""
STEPS = 2  # of the check: the first makes the base optimizer's state, fused second steps begin later
OURS = "sam_fast"
REFERENCE, REFERENCE_FUSED = "reference", "reference, fused base"
PEER_LOOP, PEER_FOREACH = "pytorch_optimizer, loop", "pytorch_optimizer, foreach"
FOREACH, COMPILED = "foreach, fused base", "torch.compile of foreach"
BEST_PEERS = (PEER_LOOP, PEER_FOREACH, FOREACH)
NORM_ERROR = 0.1  # how far off a baseline's norm may be, relative: PyTorch's loses digits where tensors are large
CLOSE = {torch.float32: (8, 0.05), torch.bfloat16: (2, 0.01)}
"""How far off float64 other results may be, relative and absolute, in the dtype's epsilons. Weights, all below 0.2, are
rounded once or twice; 16-bit momentum adds more."""


def shrink() -> None:
    """Make every set tiny, for a run that only shows that the suite works."""
    for name, shapes in SHAPES.items():
        SHAPES[name] = [[min(n, 4) for n in shape] for shape in shapes[:5]]


def make_params(shapes: list[list[int]], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    """Parameters like a network's: weights of sd 0.02, gradients of sd 0.001 (never zeros: those are faster)."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device, dtype))
        p.grad = (torch.randn(shape, generator=generator) * 0.001).to(device, dtype)
        params.append(p)
    return params


def params_of(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@dataclass
class Problem:
    """Weights, gradients and options. The gradients do not depend on the weights."""

    start: list[nn.Parameter]
    base: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=dict)
    rho: float = 0.05
    adaptive: bool = False

    @property
    def gradients(self) -> list[Any]:
        return [p.grad for p in self.start]

    def params(self) -> list[nn.Parameter]:
        """Other parameters with the same weights, without gradients."""
        return [nn.Parameter(p.detach().clone()) for p in self.start]

    def backward(self, params: Sequence[nn.Parameter]) -> Callable[[], None]:
        """Hands out the gradients as a backward pass does: in new memory, last parameter first. ``zero_grad`` frees
        them."""
        gradients = self.gradients

        def run() -> None:
            for p, own in zip(reversed(params), reversed(gradients), strict=True):
                if p.grad is None:
                    p.grad = own.clone()
                else:
                    p.grad.copy_(own)  # flatten=True: gradients stay where they are

        return run

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.start)

    @cached_property
    def norm(self) -> float:
        """``||T g||`` in float64."""
        pairs = _pieces(self.start, self.gradients)
        squares = [((p.double() if self.adaptive else 1.0) * g.double()).square().sum() for p, g in pairs]
        return float(torch.stack(squares).sum().sqrt())

    def check(self, name: str, optimizer: Any, norm_error: float = 0.0) -> None:
        """Raise an AssertionError unless the parameters are where float64 says after the first first_step and after
        ``STEPS`` steps: gradients stay what they are, so SAM ends where the base optimizer alone does."""
        params = params_of(optimizer)
        make_gradients = self.backward(params)
        for step in range(STEPS):
            make_gradients()
            optimizer.first_step()
            if step == 0:
                self.check_perturbed(name, params, norm_error)
            optimizer.zero_grad()
            make_gradients()
            optimizer.second_step()
            optimizer.zero_grad()
        # AdamW's steps are of the size of lr whatever the gradient: one near zero may be rounded to either side of it.
        slack = 0.0 if self.base is torch.optim.SGD else 0.01 * STEPS * float(self.options["lr"])
        for got, p, g in _pieces(params, self.start, self.gradients):
            wanted = nn.Parameter(p.to(torch.float64, copy=True))
            wanted.grad, base = g.double(), self.base([wanted], **self.options)
            for _ in range(STEPS):
                base.step()
            self._close(name, got, wanted.detach(), slack)

    def check_perturbed(self, name: str, got: Sequence[Tensor], norm_error: float = 0.0) -> None:
        """Raise an AssertionError unless ``got`` is ``w + rho T^2 g / ||T g||``."""
        scale = self.rho / (self.norm + 1e-12)
        for moved, p, g in _pieces(got, self.start, self.gradients):
            w = p.double()
            e = scale * g.double() * (w.square() if self.adaptive else 1.0)
            self._close(name, moved, w + e, norm_error * e.abs())

    def _close(self, name: str, got: Tensor, wanted: Tensor, slack: Tensor | float) -> None:
        relative, absolute = CLOSE[got.dtype]
        allowed = torch.finfo(got.dtype).eps * (relative * wanted.abs() + absolute) + slack
        error = (got.double() - wanted).abs()
        if not bool((error <= allowed).all()):  # NaN is not
            raise AssertionError(f"{name} is wrong, so it is not timed: off by {float(error.max()):.3g}")


def _pieces(*lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """What belongs together in these lists of tensors, in pieces that a cache holds."""
    for tensors in zip(*lists, strict=True):
        yield from zip(*(t.detach().reshape(-1).split(1 << 17) for t in tensors), strict=True)


class ForeachSAM:
    """SAM with ``torch._foreach_*`` over all parameters at once and a fused base optimizer, as written by someone who
    knows PyTorch well: the backup is allocated once; the perturbation needs one temporary, the scaled gradient."""

    def __init__(
        self, params: Any, base: Any, rho: float, adaptive: bool, compiled: bool = False, **options: Any
    ) -> None:
        self.base = base(params, **options, fused=True)
        self.params, self.rho, self.adaptive = list(params), rho, adaptive
        self.param_groups, self.zero_grad = self.base.param_groups, self.base.zero_grad
        self.backup = [torch.empty_like(p) for p in self.params]
        self.perturb = _foreach_perturb
        if compiled:
            if shutil.which(os.environ.get("CXX", "g++")) is None:
                raise ModuleNotFoundError("torch.compile needs a C++ compiler")
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
    OURS: (SAM, "defaults, but for what the case says"),
    REFERENCE: (ReferenceSAM, "sam_fast/reference.py, base optimizer with its defaults"),
    REFERENCE_FUSED: (partial(ReferenceSAM, fused=True), "sam_fast/reference.py, base optimizer with fused=True"),
    PEER_LOOP: (partial(_peer, False), "pytorch_optimizer's SAM(fused=True), foreach=False on a GPU"),
    PEER_FOREACH: (partial(_peer, True), "pytorch_optimizer's SAM(foreach=True)"),
    FOREACH: (ForeachSAM, "bench/contenders.py, torch._foreach_*, base with fused=True"),
    COMPILED: (partial(ForeachSAM, compiled=True), "the same, first_step compiled (fullgraph, static)"),
}
"""Name -> what makes it, and with which settings."""


def make(name: str, problem: Problem, **settings: Any) -> Any:
    """An optimizer on parameters of its own, with these settings besides the problem's."""
    options = {"rho": problem.rho, "adaptive": problem.adaptive, **problem.options, **settings}
    return MAKERS[name][0](problem.params(), problem.base, **options)
