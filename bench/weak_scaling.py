"""Weak scaling of the optimizer's own time, from one process to several on one machine: ``python -m
bench.weak_scaling``, or test_weak_scaling.py.

Every process has one thread (with ``--device cuda`` a GPU of its own) and the same number of parameters, whatever the
number of processes: as DDP's replicas, or as its shards of a model that grows with it (DTensor, as FSDP2 has them).
Timed are first_step and second_step, gradients being there; the time of a round is that of the slowest process. Rounds
of all cases take turns. Processes share the memory's bandwidth, which is what the optimizer is made of: the streaming
copy of the last column, which no communication slows down, says how much of a loss is the machine's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench.clock import HostTimer
from bench.shapes import MODELS
from sam_fast import SAM

COPY_ELEMENTS = 16_000_000
RHO = 0.05


def optimizer_of(shapes: list[list[int]], sharded: bool, device: str) -> SAM:
    """SAM around SGD with momentum, on parameters of these local shapes that have gradients."""
    mesh = init_device_mesh(device, (distributed.get_world_size(),)) if sharded else None
    params = []
    for shape in shapes:
        weight, grad = torch.randn(shape, device=device) * 0.02, torch.randn(shape, device=device) * 0.001
        p = nn.Parameter(weight if mesh is None else DTensor.from_local(weight, mesh, [Shard(0)], run_check=False))
        p.grad = grad if mesh is None else DTensor.from_local(grad, mesh, [Shard(0)], run_check=False)
        params.append(p)
    return SAM(params, torch.optim.SGD, rho=RHO, lr=1e-6, momentum=0.9)


def check(optimizer: SAM) -> None:
    """Refuse to time a wrong result: first_step must perturb by rho along the gradient, in float64, with its norm
    over all processes where they share.

    Raises:
        AssertionError: it does not.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    local = [(getattr(p, "_local_tensor", p).detach(), getattr(p.grad, "_local_tensor", p.grad)) for p in params]
    before = [weight.double() for weight, _ in local]
    square = torch.stack([grad.double().square().sum() for _, grad in local]).sum()
    if any(isinstance(p, DTensor) for p in params):
        distributed.all_reduce(square)
    optimizer.first_step()
    for (weight, grad), was in zip(local, before, strict=True):
        torch.testing.assert_close(weight.double(), was + RHO / square.sqrt() * grad.double(), rtol=1e-6, atol=1e-8)
    optimizer.restore()


def work(rank: int, size: int, store: str, shapes: list[list[int]], rounds: int, device: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    if device == "cuda":
        torch.cuda.set_device(rank)
    timer = HostTimer(torch.cuda.synchronize if device == "cuda" else lambda: None, work=True)
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    replicas, shards = optimizer_of(shapes, False, device), optimizer_of(shapes, True, device)
    check(replicas)
    check(shards)
    source = torch.randn(COPY_ELEMENTS, device=device)
    target = torch.empty_like(source)
    cases: dict[str, Callable[[], object]] = {
        "replica, first_step": replicas.first_step,
        "replica, second_step": replicas.second_step,
        "shard, first_step": shards.first_step,
        "shard, second_step": shards.second_step,
        "streaming copy": lambda: target.copy_(source),
    }
    times = torch.zeros(len(cases), rounds, dtype=torch.float64, device=device)
    for turn in range(-2, rounds):  # two rounds to warm up
        for i, case in enumerate(cases.values()):
            distributed.barrier()
            times[i, turn] = timer(case)
    distributed.all_reduce(times, op=distributed.ReduceOp.MAX)
    if rank == 0:
        Path(f"{store}.json").write_text(
            json.dumps({name: row.tolist() for name, row in zip(cases, times, strict=True)})
        )
    distributed.destroy_process_group()


def measured(size: int, shapes: list[list[int]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """The rounds' seconds by case, with ``size`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (size, f"{folder}/store", shapes, rounds, device), nprocs=size)
        result: dict[str, list[float]] = json.loads(Path(f"{folder}/store.json").read_text())
    return result


def named(size: int) -> str:
    return "1 process" if size == 1 else f"{size} processes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", choices=sorted(MODELS), help="whose parameters each process has")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    rounds = {
        size: measured(size, MODELS[arguments.model], arguments.rounds, arguments.device)
        for size in arguments.processes
    }
    runs = {
        size: {case: statistics.median(seconds) for case, seconds in by_case.items()}
        for size, by_case in rounds.items()
    }
    least = min(runs)
    print(
        f"{arguments.model}, {arguments.device}; milliseconds, and the efficiency (time with {least} / time with n)\n"
    )
    print("| case | " + " | ".join(map(named, runs)) + " |\n|---|" + "---|" * len(runs))
    for case, least_time in runs[least].items():
        cells = [f"{run[case] * 1e3:.2f} ({least_time / run[case]:.0%})" for run in runs.values()]
        print(f"| {case} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
