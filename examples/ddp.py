"""Handwritten digits with DistributedDataParallel.

With --own-gradient each process perturbs along the gradient of its own share of the batch (m-sharpness). Needs
scikit-learn, for the data.

Run: torchrun --nproc-per-node 2 examples/ddp.py
     torchrun --nproc-per-node 2 examples/ddp.py --own-gradient --checkpoint digits.pt
     torchrun --nproc-per-node 2 examples/ddp.py --own-gradient --checkpoint digits.pt --resume --epochs 10
"""

import argparse
import os

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sam_fast import SAM

parser = argparse.ArgumentParser()
parser.add_argument("--own-gradient", action="store_true", help="the first pass without gradient synchronisation")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--checkpoint", help="file to write after every epoch")
parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
arguments = parser.parse_args()

on_gpu = torch.cuda.is_available()
distributed.init_process_group("nccl" if on_gpu else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
first = distributed.get_rank() == 0

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train = TensorDataset(images[order[:1200]], labels[order[:1200]])
sampler = DistributedSampler(train, seed=0)
loader = DataLoader(train, batch_size=64 // distributed.get_world_size(), sampler=sampler)
test_images, test_labels = images[order[1200:]].to(device), labels[order[1200:]].to(device)

torch.manual_seed(0)
inner = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).to(
    device
)
model = DistributedDataParallel(inner)
optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
done = 0
if arguments.resume:
    saved = torch.load(arguments.checkpoint, map_location=device, weights_only=True)
    inner.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    done = saved["epoch"]

for epoch in range(done + 1, arguments.epochs + 1):
    sampler.set_epoch(epoch)
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        with optimizer.first_pass(model, sync=not arguments.own_gradient):  # around forward and backward
            cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
    if first:  # all processes have the same weights
        inner.eval()
        with torch.no_grad():
            accuracy = (inner(test_images).argmax(dim=1) == test_labels).float().mean()
        inner.train()
        print(f"epoch {epoch}: test accuracy {accuracy:.1%}", flush=True)
        if arguments.checkpoint:  # between steps: the weights are w, not w + e
            torch.save(
                {"model": inner.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch},
                f"{arguments.checkpoint}.new",
            )
            # one of the two files is whole, whenever the process is killed
            os.replace(f"{arguments.checkpoint}.new", arguments.checkpoint)
distributed.destroy_process_group()
