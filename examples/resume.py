"""Stop, save a checkpoint, resume in new objects: the weights end with the same bits as in a run that never stopped.

Run: python examples/resume.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sam_fast import SAM

EPOCHS, STOP_AFTER = 6, 3


def start() -> tuple[nn.Module, SAM, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-2)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)


def train(model: nn.Module, optimizer: SAM, scheduler: torch.optim.lr_scheduler.LRScheduler, epochs: range) -> None:
    for epoch in epochs:
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(10):
            x = torch.randn(64, 20, generator=generator)
            y = x[:, :5].argmax(dim=1)
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.first_step(zero_grad=True)
            with optimizer.second_pass(model):
                cross_entropy(model(x), y).backward()
            optimizer.second_step(zero_grad=True)
        scheduler.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, learning rate {scheduler.get_last_lr()[0]:.4f}")


with tempfile.TemporaryDirectory() as folder:
    checkpoint = Path(folder) / "checkpoint.pt"
    model, optimizer, scheduler = start()
    train(model, optimizer, scheduler, range(STOP_AFTER))
    # Between steps: the model's weights are w, not w + e.
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()},
        checkpoint,
    )
    train(model, optimizer, scheduler, range(STOP_AFTER, EPOCHS))

    print("again from the checkpoint")
    resumed, its_optimizer, its_scheduler = start()
    saved = torch.load(checkpoint, weights_only=True)
    resumed.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    its_scheduler.load_state_dict(saved["scheduler"])
    train(resumed, its_optimizer, its_scheduler, range(STOP_AFTER, EPOCHS))

same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True))
print("the same bits" if same else "the runs differ")
