"""A model whose loss is a quadratic, for closed forms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

EIGENVALUES = [5.0, 3.0, 1.0, 0.5, -2.0, 0.1, 0.0]
ROWS = [torch.zeros(2, 1), torch.zeros(3, 1)]
"""Two batches of five rows together, for losses that do not depend on them."""


class Quadratic(nn.Module):
    """``w'Hw / 2 + b'w`` with eigenvalues as given, in two parameters."""

    def __init__(self, eigenvalues: list[float]) -> None:
        super().__init__()
        n = len(eigenvalues)
        basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
        self.h = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
        self.b = torch.randn(n, dtype=torch.float64)
        self.matrix = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(n - 4, dtype=torch.float64))

    def w(self) -> Tensor:
        return torch.cat([self.matrix.flatten(), self.vector])

    def at(self, w: Tensor) -> Tensor:
        return w @ self.h @ w / 2 + self.b @ w

    def forward(self, x: Tensor) -> Tensor:
        return self.at(self.w())


def loss_of(model: nn.Module, x: Tensor, *y: Tensor) -> Tensor:
    return cross_entropy(model(x), *y) if y else model(x)
