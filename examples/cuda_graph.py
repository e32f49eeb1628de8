"""A whole SAM step as one CUDA graph: both passes, both steps and the BatchNorm statistics replayed with a single
launch.

Run: python examples/cuda_graph.py   (needs an NVIDIA GPU)
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sam_fast import SAM

if not torch.cuda.is_available():
    raise SystemExit("this example needs an NVIDIA GPU and a PyTorch built for CUDA")


def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on two noisy rings; the label says which."""
    labels, angles = torch.randint(0, 2, (n,)), torch.rand(n) * 2 * torch.pi
    radius = 1.0 + labels + 0.2 * torch.randn(n)
    return torch.stack([radius * angles.cos(), radius * angles.sin()], dim=1), labels


torch.set_default_device("cuda")
torch.manual_seed(0)
x, y = data(2000)
test_x, test_y = data(1000)
model = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
batch_x, batch_y = x[:100].clone(), y[:100].clone()  # the graph reads its batch from here


def step() -> torch.Tensor:
    loss = cross_entropy(model(batch_x), batch_y)
    loss.backward()
    optimizer.first_step(zero_grad=True)
    with optimizer.second_pass(model):
        cross_entropy(model(batch_x), batch_y).backward()
    optimizer.second_step(zero_grad=True)
    return loss


# A few eager steps allocate everything, on a stream of their own as PyTorch asks for. To change rho or lr, capture the
# graph anew.
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    for _ in range(3):
        step()
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = step()

for epoch in range(5):
    for batch in torch.randperm(len(x)).split(100):
        batch_x.copy_(x[batch])
        batch_y.copy_(y[batch])
        graph.replay()

    accuracy = (model.eval()(test_x).argmax(dim=1) == test_y).float().mean()
    model.train()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")
