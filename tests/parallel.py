"""What the tests of several processes have in common: a network, its batches, the loop, and what one process computes
by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.func import functional_call
from torch.nn.functional import mse_loss

from sam_fast import SAM
from sam_fast.reference import ReferenceSAM

STEPS = 20
RHO = 0.1
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
"""For twenty steps in float64 whose sums are taken in another order.

Each step rounds by 1e-16; the runs here differ by about 1e-14.
"""


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Layers with sizes that cannot be divided by two processes; of four, one has nothing of the last layer.

    The first layer is even, because tensor parallelism needs that.
    """
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batches(steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Batches of 16 samples. Those of different processes' shares differ in kind, so that their gradients do."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.5, 2.0, 4, dtype=dtype).repeat_interleave(4)[:, None]
    return [
        (
            scale * torch.randn(16, 7, generator=generator, dtype=dtype),
            torch.randn(16, 3, generator=generator, dtype=dtype),
        )
        for _ in range(steps)
    ]


def share(batch: tuple[Tensor, Tensor], index: int, of: int) -> tuple[Tensor, Tensor]:
    """The part of a batch that belongs to one of ``of`` replicas."""
    x, y = batch
    return x.chunk(of)[index], y.chunk(of)[index]


def my_share(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return share(batch, distributed.get_rank(), distributed.get_world_size())


def train(
    model: nn.Module, optimizer: SAM, data: Sequence[tuple[Tensor, Tensor]], sync: bool = True, micro_batches: int = 1
) -> None:
    """The loop of the guide; with micro-batches gradients are synchronised with the last of them."""

    def one_pass(x: Tensor, y: Tensor) -> None:
        parts = list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True))
        for i, (some_x, some_y) in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                (mse_loss(model(some_x), some_y) / micro_batches).backward()

    for x, y in data:
        with optimizer.first_pass(model, sync=sync):
            one_pass(x, y)
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            one_pass(x, y)
        optimizer.second_step(zero_grad=True)


def collectives(call: Callable[[], Any]) -> list[str]:
    """The names of the collectives that ``call`` starts from this thread."""
    with CommDebugMode() as seen:
        call()
    return [
        str(operation).rsplit(".", 1)[-1] for operation, count in seen.get_comm_counts().items() for _ in range(count)
    ]


def weights(model: nn.Module) -> list[Tensor]:
    """The whole of every parameter, wherever its parts are."""
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def one_process(
    steps: int = STEPS, base: Any = torch.optim.SGD, frozen: Sequence[int] = (), groups: Any = None, **options: Any
) -> list[Tensor]:
    """SAM on the whole batch, in one process, by the reference implementation."""
    model = network()
    for index in frozen:
        list(model.parameters())[index].requires_grad_(False)
    optimizer = ReferenceSAM(
        model.parameters() if groups is None else groups(model), base, **({"rho": RHO} | (options or SGD))
    )
    for x, y in batches(steps):
        for step in (optimizer.first_step, optimizer.second_step):
            mse_loss(model(x), y).backward()
            step(zero_grad=True)
    return weights(model)


def each_its_own(replicas: int, steps: int = STEPS) -> list[Tensor]:
    """m-sharpness: every replica is perturbed along the gradient of its own share, and their gradients at w + e_r are
    averaged.

    Made of stateless calls, with no optimizer but the base: it shares nothing with what it is compared with.
    """
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)

    def gradient(at: dict[str, Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(mse_loss(functional_call(model, at, (x,)), y), list(at.values())))

    for batch in batches(steps):
        w = dict(model.named_parameters())
        second = []
        for replica in range(replicas):
            x, y = share(batch, replica, replicas)
            g = gradient(w, x, y)
            norm = sum((part * part).sum() for part in g).sqrt()
            perturbed = {
                name: (p + RHO * part / norm).detach().requires_grad_()
                for (name, p), part in zip(w.items(), g, strict=True)
            }
            second.append(gradient(perturbed, x, y))
        for p, *of_all in zip(w.values(), *second, strict=True):
            p.grad = torch.stack(of_all).mean(0)
        optimizer.step()
    return weights(model)
