"""Run by two processes at once: trains in a framework and saves rank 0's model.

Usage: two_processes.py FRAMEWORK FILE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import environment  # noqa: E402, F401
import oracle  # noqa: E402
import torch  # noqa: E402

from sam_fast import SAM, TrainStep  # noqa: E402

RHO, LR = 0.3, 0.1


def shard(rank: int) -> list[Any]:
    """Every second row, in batches of 4."""
    x, y = (t[rank::2] for t in oracle.data(24))
    return list(zip(x.split(4), y.split(4), strict=True))


def layer_norm_net() -> Any:
    """Without BatchNorm, whose statistics differ between the processes."""
    net = oracle.small_net()
    net[1] = torch.nn.LayerNorm(8, dtype=torch.float64)
    return net


def with_accelerate() -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = layer_norm_net()
    model, optimizer = accelerator.prepare(model, SAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9))
    step = TrainStep(
        model, optimizer, oracle.cross_entropy, micro_batches=2, clip_grad_norm=0.2, backward=accelerator.backward
    )
    for batch in shard(accelerator.process_index):
        with accelerator.accumulate(model):
            step(batch)
    return accelerator.unwrap_model(model)


def with_fabric() -> Any:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model = layer_norm_net()
    model, optimizer = fabric.setup(model, SAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9))
    step = TrainStep(
        model, optimizer, oracle.cross_entropy, micro_batches=2, clip_grad_norm=0.2, backward=fabric.backward
    )
    for batch in shard(fabric.global_rank):
        step(batch)
    return model.module


def with_transformers() -> Any:
    import trainer_runs

    model = trainer_runs.language_model()
    trainer_runs.train("trained", model, rows=12, gradient_accumulation_steps=2)
    return model


if __name__ == "__main__":
    run = {"accelerate": with_accelerate, "fabric": with_fabric, "transformers": with_transformers}
    trained = run[sys.argv[1]]()
    if os.environ["RANK"] == "0":
        torch.save(trained.state_dict(), sys.argv[2])
