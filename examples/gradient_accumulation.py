"""Gradient accumulation: the first pass over all micro-batches, then the second pass over the same ones.

The result is the big batch's SAM step, with the memory of a micro-batch. BatchNorm would see micro-batches, so this
model uses LayerNorm.

Run: python examples/gradient_accumulation.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sam_fast import SAM


def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on two noisy rings; the label says which."""
    labels = torch.randint(0, 2, (n,))
    angles = torch.rand(n) * 2 * torch.pi
    radius = 1.0 + labels + 0.2 * torch.randn(n)
    return torch.stack([radius * angles.cos(), radius * angles.sin()], dim=1), labels


torch.manual_seed(0)
x, y = data(2000)
test_x, test_y = data(1000)
model = nn.Sequential(nn.Linear(2, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 2))
optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

for epoch in range(5):
    for batch in torch.randperm(len(x)).split(400):
        micro_batches = batch.split(100)
        for micro in micro_batches:
            loss = cross_entropy(model(x[micro]), y[micro])
            (loss / len(micro_batches)).backward()
        optimizer.first_step(zero_grad=True)

        with optimizer.second_pass(model):
            for micro in micro_batches:
                (cross_entropy(model(x[micro]), y[micro]) / len(micro_batches)).backward()
        optimizer.second_step(zero_grad=True)

    model.eval()
    accuracy = (model(test_x).argmax(dim=1) == test_y).float().mean()
    model.train()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")
print("done")
