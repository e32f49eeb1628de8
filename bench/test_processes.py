"""What takes a process of its own: peak memory, weak scaling, the import."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench import peers
from bench.harness import Bench, Contender, Plan, measure
from bench.models import MODELS
from bench.peers import FOREACH, OURS, PEER_FOREACH, PEER_LOOP, REFERENCE
from bench.problem import Problem, make_params
from bench.records import Record
from bench.timers import HostTimer
from sam_fast import SAM

pytestmark = pytest.mark.once
MEMORY, WEAK_SCALING = "peak memory", "weak scaling"
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
PLAIN, FLAT = "SGD", "sam_fast, flatten"
WIDTH, LAYERS, BATCH = 2048, 8, 8
RHO = 0.05


# ---- Memory ----------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Peak resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss is at least what the parent had when it started this process
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_bytes(contender: str, device: str) -> int:
    """What three training steps need beyond what there was before the model. In a new process: a peak never sinks."""
    if contender in (PEER_LOOP, PEER_FOREACH):
        import pytorch_optimizer  # noqa: F401  # its own memory is not the step's
    x = torch.randn(BATCH, WIDTH, device=device)
    nn.Linear(WIDTH, 64, device=device)(x).sum().backward()
    before = resident() if device == "cpu" else torch.cuda.memory_allocated()
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH, device=device), nn.ReLU())]
    model = nn.Sequential(*layers)
    maker = peers.MAKERS[OURS if contender == FLAT else contender][0] if contender != PLAIN else None
    options = {"rho": RHO, "adaptive": False, **SGD, **({"flatten": True} if contender == FLAT else {})}
    params = list(model.parameters())
    optimizer = maker(params, torch.optim.SGD, **options) if maker else torch.optim.SGD(params, fused=True, **SGD)
    for _ in range(3):
        model(x).square().mean().backward()
        if maker:
            optimizer.first_step()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.second_step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    return (resident() if device == "cpu" else torch.cuda.max_memory_allocated()) - before


def test_memory(bench: Bench) -> None:
    """Peak memory of three training steps."""
    names = [OURS, FLAT, PLAIN, REFERENCE, *([PEER_LOOP, PEER_FOREACH, FOREACH] if bench.full else [])]
    peaks = {}
    for name in names:
        with get_context("spawn").Pool(1) as pool:
            peaks[name] = [float(pool.apply(peak_bytes, (name, bench.device)))]
    elements = LAYERS * (WIDTH * WIDTH + WIDTH)
    # The weights and their gradients are there in any case; less was not measured right.
    assert min(peaks.values())[0] > 2 * 4 * elements
    how = "as the allocator says" if bench.device == "cuda" else "peak RSS of a child process"
    facts = {"unit": "bytes", "how": how, "device": bench.machine.kind}
    bench.add(Record(MEMORY, f"{LAYERS} linear layers of {WIDTH}", OURS, peaks, elements, facts=facts))


# ---- Weak scaling ----------------------------------------------------------------------------------------------------


def optimizer_of(shapes: list[list[int]], sharded: bool, device: str) -> SAM:
    """SAM around SGD with momentum, on parameters of these local shapes that have gradients. Refuses a wrong result:
    first_step must perturb by rho along the gradient, with its norm over all processes where they share."""
    mesh = init_device_mesh(device, (distributed.get_world_size(),)) if sharded else None
    params = start = make_params(shapes, device=device)
    if mesh is not None:
        shard = partial(DTensor.from_local, device_mesh=mesh, placements=[Shard(0)], run_check=False)
        params = [nn.Parameter(shard(p.detach().clone())) for p in start]
        for p, q in zip(params, start, strict=True):
            p.grad = shard(q.grad)
    optimizer = SAM(params, torch.optim.SGD, rho=RHO, lr=1e-6, momentum=0.9)
    # every process has the same gradients: the norm over all of them is sqrt(size) times that of one
    size = distributed.get_world_size() if sharded else 1
    problem = Problem(start, rho=RHO / math.sqrt(size), options={"lr": 1e-6})
    optimizer.first_step()
    got = [p.to_local() if isinstance(p, DTensor) else p for p in params]
    problem.check_perturbed("first_step", got)
    optimizer.restore()
    return optimizer


def work(rank: int, size: int, store: str, shapes: list[list[int]], rounds: int, device: str) -> None:
    """One process: its rounds of every case begin together with the others', and the slowest counts."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    source = torch.randn(16_000_000, device=device)
    target = torch.empty_like(source)
    contenders = {"": Contender({"streaming copy": lambda: target.copy_(source)}, distributed.barrier)}
    for kind in ("replica", "shard"):
        optimizer = optimizer_of(shapes, kind == "shard", device)
        steps = {f"{kind}, {step}": getattr(optimizer, step) for step in ("first_step", "second_step")}
        contenders[kind] = Contender(steps, distributed.barrier)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times, _ = measure(contenders, Plan(0.0, (rounds, rounds)), lambda _: HostTimer(synchronize, work=True))
    slowest = torch.tensor([v for row in times.values() for v in row.values()], dtype=torch.float64, device=device)
    distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
    if rank == 0:
        Path(f"{store}.json").write_text(json.dumps(dict(zip(times, slowest.tolist(), strict=True))))
    distributed.destroy_process_group()


def test_weak_scaling(bench: Bench) -> None:
    """The optimizer's own time with several processes, each with one thread (or GPU) and the same number of parameters,
    as replicas or as shards of DTensors, relative to one. Processes on one machine share its memory: the streaming copy
    shows what that costs."""
    most = torch.cuda.device_count() if bench.device == "cuda" else min(os.cpu_count() or 1, 2)
    if most == 1:
        pytest.skip("needs two cores, or two GPUs")
    by_size: dict[str, dict[str, list[float]]] = {}
    for size in sorted({most, 1} | {n for n in (2, 4) if n < most}, reverse=True):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (size, f"{folder}/store", MODELS["resnet18"], 3 if bench.smoke else 30, bench.device)
            multiprocessing.spawn(work, arguments, nprocs=size)
            name = f"{size} process{'es' if size > 1 else ''}"
            by_size[name] = json.loads(Path(f"{folder}/store.json").read_text())
    for case in by_size["1 process"]:
        rounds = {name: by_case[case] for name, by_case in by_size.items()}
        bench.shown = bench.add(Record(WEAK_SCALING, case, next(iter(rounds)), rounds))


# ---- The import ------------------------------------------------------------------------------------------------------


def test_import_time(bench: Bench) -> None:
    """Seconds that ``import sam_fast`` adds to ``import torch``, in fresh processes."""
    script = "import time, torch; t = time.perf_counter(); import sam_fast; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", script]
    cached = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    samples = [
        float(subprocess.run(command, check=True, capture_output=True, text=True, env=cached).stdout) for _ in range(4)
    ]
    bench.shown = bench.add(Record("import sam_fast after import torch", "fresh process", OURS, {OURS: samples[1:]}))
