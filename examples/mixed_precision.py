"""Mixed precision in float16: both losses are scaled, and the scaler makes the second step.

Run: python examples/mixed_precision.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from sam_fast import SAM


def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on two noisy rings; the label says which."""
    labels = torch.randint(0, 2, (n,), device=device)
    angles = torch.rand(n, device=device) * 2 * torch.pi
    radius = 1.0 + labels + 0.2 * torch.randn(n, device=device)
    return torch.stack([radius * angles.cos(), radius * angles.sin()], dim=1), labels


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
x, y = data(2000)
test_x, test_y = data(1000)
model = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2)).to(device)
optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
scaler = torch.amp.GradScaler(device)

for epoch in range(5):
    for batch in torch.randperm(len(x), device=device).split(100):
        with torch.autocast(device, dtype=torch.float16):
            loss = cross_entropy(model(x[batch]), y[batch])
        scaler.scale(loss).backward()
        optimizer.first_step(zero_grad=True)  # takes scaled gradients: the perturbation does not depend on the scale

        with optimizer.second_pass(model):
            with torch.autocast(device, dtype=torch.float16):
                loss_2 = cross_entropy(model(x[batch]), y[batch])
            scaler.scale(loss_2).backward()
        scaler.unscale_(optimizer)  # only to clip: scaler.step unscales by itself
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)  # restores the weights; no update if a gradient of either pass was not finite
        scaler.update()
        optimizer.zero_grad()

    model.eval()
    accuracy = (model(test_x).argmax(dim=1) == test_y).float().mean()
    model.train()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}, scale {scaler.get_scale():.0f}")
print("done")
