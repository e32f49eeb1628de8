"""The short loop: ``second_pass`` keeps the BatchNorm statistics right and restores the weights if its body raises.

``first_pass(model, replay_rng=True)`` around the first pass makes dropout draw the same masks in both.

Run: python examples/second_pass.py
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
model = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2))
optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

for epoch in range(5):
    for batch in torch.randperm(len(x)).split(100):
        with optimizer.first_pass(model, replay_rng=True):
            loss = cross_entropy(model(x[batch]), y[batch])
            loss.backward()
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.second_step(zero_grad=True)

    model.eval()
    accuracy = (model(test_x).argmax(dim=1) == test_y).float().mean()
    model.train()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")
print("done")
