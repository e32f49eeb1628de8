"""Handwritten digits with FSDP2: weights, gradients and SAM's backup are sharded, and there is one norm for all
processes.

The checkpoint may be resumed by any number of processes. Needs scikit-learn, for the data.

Run: torchrun --nproc-per-node 2 examples/fsdp.py --checkpoint digits
     torchrun --nproc-per-node 1 examples/fsdp.py --checkpoint digits --resume --epochs 10
"""

import argparse
import os
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sam_fast import SAM

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--checkpoint", help="folder for a checkpoint after every epoch")
parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
arguments = parser.parse_args()

on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
distributed.init_process_group("nccl" if on_gpu else "gloo")

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train = TensorDataset(images[order[:1200]], labels[order[:1200]])
sampler = DistributedSampler(train, seed=0)
loader = DataLoader(train, batch_size=64 // distributed.get_world_size(), sampler=sampler)
test_images, test_labels = images[order[1200:]].to(device), labels[order[1200:]].to(device)

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).to(
    device
)
for layer in (model[1], model[3]):
    fully_shard(layer)
fully_shard(model)
# after fully_shard, which makes new parameters
optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=2e-3)
state = {"epoch": 0}
if arguments.resume:
    state["model"], state["optimizer"] = get_state_dict(model, optimizer)
    # .metadata is written last: a checkpoint whose writing was interrupted has none
    whole = [entry.parent for entry in Path(arguments.checkpoint).glob("*/.metadata")]
    checkpoint.load(state, checkpoint_id=max(whole, key=lambda folder: int(folder.name)))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

for epoch in range(state["epoch"] + 1, arguments.epochs + 1):
    sampler.set_epoch(epoch)
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
    with torch.no_grad():  # all processes: a forward pass gathers the weights
        accuracy = (model(test_images).argmax(dim=1) == test_labels).float().mean()
    if distributed.get_rank() == 0:
        print(f"epoch {epoch}: test accuracy {accuracy:.1%}", flush=True)
    if arguments.checkpoint:  # between steps: the weights are w, not w + e
        state["model"], state["optimizer"] = get_state_dict(model, optimizer)
        checkpoint.save(state | {"epoch": epoch}, checkpoint_id=Path(arguments.checkpoint) / str(epoch))
distributed.destroy_process_group()
