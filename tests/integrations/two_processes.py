"""Run by two processes at once: trains in each framework in turn and saves rank 0's model under its name.

Usage: two_processes.py FOLDER FRAMEWORK...
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
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

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


def with_lightning_fsdp2() -> Any:
    import lightning_runs
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Sharded(lightning_runs.Module):
        def configure_model(self) -> None:
            for layer in (self.net[0], self.net[4], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

        def train_dataloader(self) -> Any:
            halves = [half for x, y in shard(self.global_rank) for half in zip(x.split(2), y.split(2), strict=True)]
            return DataLoader(halves, batch_size=None)

    module = Sharded()
    module.net = layer_norm_net()
    options = {"devices": 2, "max_epochs": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 0.2}
    options["use_distributed_sampler"] = False
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    lightning_runs.trainer(lightning_runs.SAMCallback(), strategy=strategy, **options).fit(module)
    return module.net


def with_accelerate_fsdp2() -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    use_fsdp2(accelerator)
    model = layer_norm_net()
    model, optimizer = accelerator.prepare(model, SAM(model.parameters(), rho=RHO, lr=LR, momentum=0.9))
    step = TrainStep(
        model, optimizer, oracle.cross_entropy, micro_batches=2, clip_grad_norm=0.2, backward=accelerator.backward
    )
    for batch in shard(accelerator.process_index):
        step(batch)
    return model


def use_fsdp2(accelerator: Any) -> None:
    """Switch FSDP2 on, which Accelerate itself does only with GPUs."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin


def with_transformers() -> Any:
    import trainer_runs

    model = trainer_runs.language_model()
    trainer_runs.train("trained", model, rows=12, gradient_accumulation_steps=2)
    return model


def with_transformers_fsdp2() -> Any:
    import trainer_runs

    class Sharded(trainer_runs.SAMTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            use_fsdp2(self.accelerator)
            self.is_fsdp_enabled = True

    model = trainer_runs.language_model()
    trainer_runs.train("trained", model, rows=12, gradient_accumulation_steps=2, cls=Sharded)
    return model


if __name__ == "__main__":
    for name in sys.argv[2:]:
        if "accelerate" in sys.modules:
            sys.modules["accelerate"].state.AcceleratorState._reset_state(True)
        state = globals()[f"with_{name}"]().state_dict()
        sharded = any(isinstance(p, DTensor) for p in state.values())
        assert sharded == name.endswith("fsdp2")
        state = {name: p.full_tensor() if sharded else p for name, p in state.items()}
        if os.environ["RANK"] == "0":
            torch.save(state, Path(sys.argv[1]) / name)
