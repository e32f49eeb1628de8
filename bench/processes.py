"""What takes a process of its own: peak memory, weak scaling, the import."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench.contenders import OURS, REFERENCE, SHAPES, Problem, make_params
from bench.harness import Bench, Case, Contender, Work, mallopt, measure, synchronize
from bench.records import COPY, Record
from bench.training import SGD_ONCE, perturbed, plain
from sam_fast import SAM
from sam_fast.reference import ReferenceSAM

MEMORY, WEAK_SCALING = "peak memory", "weak scaling"
ITERATIONS: dict[str, Callable[..., Work]] = {  # whose memory is measured
    OURS: perturbed,
    "sam_fast, flatten": partial(perturbed, sam=partial(SAM, flatten=True)),
    SGD_ONCE: plain,
    REFERENCE: partial(perturbed, sam=ReferenceSAM),
}
WIDTH, LAYERS, BATCH = 2048, 8, 8


def resident() -> int:
    """Peak resident set of this process so far, in bytes. Not ru_maxrss, which begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def peak_bytes(contender: str, device: str) -> float:
    """What three training iterations need beyond what there was before the model; in a new process, as a peak never
    sinks."""
    mallopt(-3, 1 << 16)  # a tensor's memory goes back when it is freed: what the allocator keeps is chance
    x, y = torch.randn(BATCH, WIDTH, device=device), torch.zeros(BATCH, dtype=torch.int64, device=device)
    nn.Linear(WIDTH, 64, device=device)(x).sum().backward()
    before = resident() if device == "cpu" else torch.cuda.memory_allocated()
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH, device=device), nn.ReLU())]
    iteration = ITERATIONS[contender](nn.Sequential(*layers), x, y)
    for _ in range(3):
        iteration()
    return float((resident() if device == "cpu" else torch.cuda.max_memory_allocated()) - before)


def memory(bench: Bench, case: Case) -> None:
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        found = pool.starmap(peak_bytes, [(name, bench.device) for name in ITERATIONS], chunksize=1)
    elements = LAYERS * (WIDTH * WIDTH + WIDTH)
    # The weights and their gradients are there in any case; less was not measured right.
    assert min(found) > 2 * 4 * elements
    peaks = {name: [peak] for name, peak in zip(ITERATIONS, found, strict=True)}
    bench.add(Record(case.group, case.name, OURS, peaks, elements, facts={"unit": "bytes"}))


def optimizer_of(shapes: list[list[int]], sharded: bool, device: str) -> SAM:
    """SAM around SGD with momentum, on parameters of these local shapes that have gradients. Refuses a wrong result:
    first_step must perturb by rho along the gradient, with its norm over all processes where they share."""
    rho, size = 0.05, distributed.get_world_size() if sharded else 1
    # every process has the same gradients: the norm over all of them is sqrt(size) times that of one
    problem = Problem(make_params(shapes, device=device), rho=rho / math.sqrt(size))
    params, gradients = problem.params(), problem.gradients
    if sharded:
        mesh = init_device_mesh(device, (size,))
        shard = partial(DTensor.from_local, device_mesh=mesh, placements=[Shard(0)], run_check=False)
        params, gradients = [nn.Parameter(shard(p.detach())) for p in params], [shard(g) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    optimizer = SAM(params, torch.optim.SGD, rho=rho, lr=1e-6, momentum=0.9)
    optimizer.first_step()
    problem.check_perturbed("first_step", [p.to_local() if isinstance(p, DTensor) else p for p in params])
    optimizer.restore()
    return optimizer


def work(rank: int, size: int, store: str, shapes: list[list[int]], rounds: int, device: str, found: Any) -> None:
    """One process: its rounds of every stage begin together with the others', and the slowest counts."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = distributed.get_default_backend_for_device(device)
    distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    source = torch.randn(16_000_000, device=device)
    target = torch.empty_like(source)
    stages: dict[str, Callable[[], object]] = {COPY: lambda: target.copy_(source)}
    for kind in ("replica", "shard"):
        optimizer = optimizer_of(shapes, kind == "shard", device)
        stages |= {f"{kind}, {step}": getattr(optimizer, step) for step in ("first_step", "second_step")}
    done = {name: lambda run=run: (run(), synchronize()) for name, run in stages.items()}
    timers = measure({"": Contender(done, distributed.barrier)}, 0.0, (rounds, rounds))
    slowest = torch.tensor([row[""].rounds for row in timers.values()], dtype=torch.float64, device=device)
    distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
    if rank == 0:
        found.put(dict(zip(timers, slowest.tolist(), strict=True)))
    distributed.destroy_process_group()


def weak_scaling(bench: Bench, case: Case) -> None:
    """The optimizer's own time with several processes, each with one thread (or GPU) and the same number of parameters.
    They share the machine's memory: the streaming copy shows what that costs."""
    most = torch.cuda.device_count() if bench.device == "cuda" else min(os.cpu_count() or 1, 2)
    if most == 1:
        return bench.leave_out(f"{case.group}: needs two cores, or two GPUs")
    by_size: dict[str, dict[str, list[float]]] = {}
    found = multiprocessing.get_context("spawn").SimpleQueue()
    for size in sorted({most, 1} | {n for n in (2, 4) if n < most}, reverse=True):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (size, f"{folder}/store", SHAPES[case.name], 3 if bench.smoke else 30, bench.device, found)
            multiprocessing.spawn(work, arguments, nprocs=size)
        by_size[f"{size} process{'es' if size > 1 else ''}"] = found.get()
    for stage in by_size["1 process"]:
        rounds = {processes: by_stage[stage] for processes, by_stage in by_size.items()}
        bench.add(Record(case.group, stage, next(iter(rounds)), rounds))


def import_time(bench: Bench, case: Case) -> None:
    """Seconds that ``import sam_fast`` adds to ``import torch``, in fresh processes."""
    script = "import time, torch; t = time.perf_counter(); import sam_fast; print(time.perf_counter() - t)"
    cached = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # as users have it; the first run may have to compile
    run = partial(subprocess.check_output, [sys.executable, "-c", script], env=cached)
    bench.add(Record(case.group, case.name, OURS, {OURS: [float(run()) for _ in range(4)][1:]}))
