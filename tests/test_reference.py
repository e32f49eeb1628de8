"""sam_fast/reference.py is no straw man: it runs the operations of the public implementation, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sam_fast.reference import ReferenceSAM

BASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.1}),
]
Operation = tuple[str, list[tuple[tuple[int, ...], torch.dtype]]]


class PublicSAM:
    """The public implementation's two steps, written down from the list of its operations and not from reference.py."""

    def __init__(self, groups: list[dict[str, Any]], base: Any, **options: Any) -> None:
        self.base = base(groups, **options)
        self.kept: dict[Tensor, Tensor] = {}

    def with_gradients(self) -> list[tuple[dict[str, Any], nn.Parameter]]:
        return [(group, p) for group in self.base.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self) -> None:
        lengths = [
            torch.norm((torch.abs(p) if group["adaptive"] else 1.0) * p.grad, p=2) for group, p in self.with_gradients()
        ]
        norm = torch.norm(torch.stack(lengths), p=2)
        for group in self.base.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                if p.grad is not None:
                    self.kept[p] = p.data.clone()
                    e = (torch.pow(p, 2) if group["adaptive"] else 1.0) * p.grad * scale.to(p)
                    p.add_(e)

    @torch.no_grad()
    def second_step(self) -> None:
        for _, p in self.with_gradients():
            p.data = self.kept[p]
        self.base.step()


class Recorder(TorchDispatchMode):
    """Writes down what ATen is asked for: names, and the shapes and dtypes of the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.operations.append((str(func), [(tuple(t.shape), t.dtype) for t in tensors]))
        return func(*args, **(kwargs or {}))


def make_groups(adaptive: bool, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Three groups: the second has a rho of its own, the third is of the other kind."""
    shapes: list[list[list[int]]] = [[[5, 3], [7], []], [[4, 2, 3, 3], [6]], [[2, 2]]]
    params = [[nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in group] for group in shapes]
    kinds = [(0.5, adaptive), (2.0, adaptive), (0.5, not adaptive)]
    return [{"params": p, "rho": rho, "adaptive": kind} for p, (rho, kind) in zip(params, kinds, strict=True)]


def steps(optimizer: Any, params: Sequence[nn.Parameter]) -> list[Operation]:
    """What the second of two steps runs: the first makes the base optimizer's state. The second parameter never has a
    gradient."""
    for _ in range(2):
        recorder = Recorder()
        for step in (optimizer.first_step, optimizer.second_step):
            for i, p in enumerate(params):
                p.grad = None if i == 1 else torch.full_like(p, 0.1)
            with recorder:
                step()
    return recorder.operations


@pytest.mark.parametrize(("base", "options"), BASES, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_runs_the_public_implementation_s_operations(base, options, adaptive, dtype):
    found = []
    for sam in (PublicSAM, ReferenceSAM):
        torch.manual_seed(0)
        groups = make_groups(adaptive, dtype)
        params = [p for group in groups for p in group["params"]]
        found.append((steps(sam(groups, base, **options), params), [p.detach() for p in params]))
    (public, expected), (reference, got) = found
    assert len(public) > 40
    assert reference == public
    assert all(map(torch.equal, got, expected))
