"""The loss along random filter-normalised directions around a solution (Li et al.

2018, https://arxiv.org/abs/1712.09913).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from .metrics import EVAL_BATCH, evaluating


@dataclass(frozen=True)
class Landscape:
    """``losses[d][i]``: mean loss (nats) at ``steps[i]`` along direction d.

    Step 0 is the solution; step 1 moves each filter by its own norm.
    """

    steps: list[float]
    losses: list[list[float]]


def random_direction(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A Gaussian direction in which each filter has the norm of the model's own filter; no movement in biases and
    normalisation layers.

    A filter is one output channel of a convolution or one output row of a linear layer: one slice along the first
    dimension of any parameter that has two or more. Because of this scaling, solutions with weights of different sizes
    can be compared.

    Returns:
        Parameter name -> tensor of the parameter's shape. Same generator state and same architecture: same Gaussian
        draws.
    """
    direction = {}
    for name, p in model.named_parameters():
        with torch.no_grad():
            if p.dim() < 2:
                direction[name] = torch.zeros(p.shape)
                continue
            draw = torch.randn(p.shape, generator=generator)
            rows = tuple(range(1, p.dim()))
            own = torch.linalg.vector_norm(p.float(), dim=rows, keepdim=True)
            drawn = torch.linalg.vector_norm(draw, dim=rows, keepdim=True)
            direction[name] = draw * (own / drawn)
    return direction


@torch.no_grad()
def loss_along(
    model: nn.Module, images: Tensor, labels: Tensor, *, directions: int, points: int, span: float, seed: int
) -> Landscape:
    """The model's mean cross-entropy at ``points`` steps in [-span, span] along each of ``directions`` random
    directions.

    Args:
        images, labels: (n, 1, height, width) and (n,).
        seed: of the directions; give two models the same, and the same Gaussian draws are scaled to each model's
            filters.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = torch.linspace(-span, span, points).tolist()
    params = dict(model.named_parameters())
    losses = []
    with evaluating(model):
        for _ in range(directions):
            direction = random_direction(model, generator)
            along = []
            for step in steps:
                moved = {name: p.float() + step * direction[name] for name, p in params.items()}
                total = sum(
                    float(cross_entropy(functional_call(model, moved, (x,)), y, reduction="sum"))
                    for x, y in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True)
                )
                along.append(total / len(labels))
            losses.append(along)
    return Landscape(steps, losses)
