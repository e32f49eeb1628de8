"""Measurements on a GPU: every contender in turn, timed by device events, next to a device-to-device copy measured in the same run.

    python -m bench.gpu --json FILE [--device cuda] [--seconds 120]

A wrong result is never timed: every case is compared with the formula in float64 first. `make gpu-check` runs this and keeps the figures.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.clock import Clock
from bench.harness import BYTES_PER_ELEMENT, Backward, Contender, Method, Problem, copies, make_params
from bench.ops import operation_contenders
from bench.shapes import MODELS
from sam_fast import SAM, backends
from sam_fast.reference import ReferenceSAM

COPY_BYTES = 1 << 30
ROUNDS = 25
SGD: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Figure:
    """One measured number, and what it is compared with."""

    group: str
    case: str
    contender: str
    seconds: float
    spread: tuple[float, float]
    """The quartiles of the rounds."""
    elements: int = 0
    bytes_moved: int | None = None
    """That must move. None: not bound by memory."""
    gigabytes_per_second: float | None = None
    share_of_copy: float | None = None
    times_faster_than: dict[str, float] = field(default_factory=dict)


def gpu_backends(device: str) -> list[str]:
    probe = torch.zeros(16, device=device)
    return [name for name in backends.available() if backends.BACKENDS[name].rejects(probe) is None]


def measure(clock: Clock, contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every contender, one round of each in turn; the first two rounds are not counted.

    The copy, where it is among them, also runs before every other one, so that each finds the caches as the others do.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 2):
        for name, contender in contenders.items():
            contender.prepare()
            if "copy" in contenders:
                contenders["copy"].stages[""]()
            times[name].append(clock.seconds(contender.stages[""]))
            contender.finish()
    return {name: values[2:] for name, values in times.items()}


class Bench:
    """Collects figures until the time is up; what was left out is listed."""

    def __init__(self, device: str, seconds: float, shapes: dict[str, list[list[int]]], rounds: int = ROUNDS, copy_bytes: int = COPY_BYTES) -> None:
        self.device = device
        self.clock = Clock(device)
        self.deadline = time.monotonic() + seconds
        self.shapes = shapes
        self.rounds = rounds
        self.figures: list[Figure] = []
        self.left_out: list[str] = []
        self._drawn: tuple[str, list[nn.Parameter]] = ("", [])
        source = torch.rand(copy_bytes // 4, device=device)
        target = torch.empty_like(source)
        self.copy = Contender(lambda: target.copy_(source))
        self.copy_bytes = 2 * source.nbytes

    def params(self, model: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        """New parameters with these shapes, with gradients. The numbers are drawn once for each model: that takes seconds."""
        if self._drawn[0] != model:
            self._drawn = (model, make_params(self.shapes[model]))
        out = []
        for p in self._drawn[1]:
            q = nn.Parameter(p.detach().to(self.device, dtype, copy=True))
            assert p.grad is not None
            q.grad = p.grad.to(self.device, dtype, copy=True)
            out.append(q)
        return out

    def run(self) -> None:
        for name, case in self.cases():
            if time.monotonic() > self.deadline:
                self.left_out.append(f"{name}: not run, the time was up")
                continue
            try:
                case()
            except torch.cuda.OutOfMemoryError as error:
                self.left_out.append(f"{name}: not run, {error}")
            gc.collect()

    def cases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        for model in self.shapes:
            yield f"first_step {model}", lambda model=model: self.first_step(model)
        yield "host time", self.host_time
        model = max(self.shapes, key=lambda name: sum(torch.Size(s).numel() for s in self.shapes[name]))
        for dtype in DTYPES:
            yield f"operations {dtype}", lambda dtype=dtype: self.operations(model, dtype)
        yield "order of perturb", lambda: self.order_of_perturb(model)
        for model in self.shapes:
            yield f"optimizer step {model}", lambda model=model: self.optimizer_step(model)

    def add(self, group: str, case: str, elements: int, bytes_moved: int | None, times: dict[str, list[float]], baselines: list[str]) -> None:
        medians = {name: statistics.median(values) for name, values in times.items()}
        bandwidth = self.copy_bytes / medians.pop("copy") if "copy" in medians else None
        for name, seconds in medians.items():
            if len(times[name]) > 3:
                quartiles = statistics.quantiles(times[name], n=4)
                spread = (quartiles[0], quartiles[2])
            else:
                spread = (min(times[name]), max(times[name]))
            figure = Figure(group, case, name, seconds, spread, elements, bytes_moved)
            if bytes_moved is not None and bandwidth is not None:
                figure.gigabytes_per_second = bytes_moved / seconds / 1e9
                figure.share_of_copy = bytes_moved / seconds / bandwidth
            figure.times_faster_than = {other: medians[other] / seconds for other in baselines if other != name and other in medians}
            self.figures.append(figure)

    def first_step(self, model: str) -> None:
        """On the device alone, and with its launches: as a training loop waits for it whose device is idle."""
        start = self.params(model)
        elements = sum(p.numel() for p in start)
        contenders: dict[str, Contender] = {"copy": self.copy}
        for name in gpu_backends(self.device):
            params = copies(start)
            optimizer = SAM(params, lr=0.0, backend=name)
            problem = Problem(start, options={"lr": 0.0})
            problem.check(name, Method(optimizer, params))
            Backward(params, problem.gradients())()
            contenders[name] = Contender(optimizer.first_step, finish=optimizer.restore)
        reference_params = copies(start)
        reference = ReferenceSAM(reference_params, torch.optim.SGD, lr=0.0)
        backward = Backward(reference_params)

        def finish() -> None:
            reference.second_step(zero_grad=True)
            backward()

        contenders["reference"] = Contender(reference.first_step, finish=finish)
        peer = peer_optimizer(copies(start))
        if peer is not None:
            contenders["pytorch_optimizer"] = peer
        for group, head_start in (("first_step", self.clock.head_start), ("first_step with its launches", 0)):
            clock = Clock(self.device)
            clock.head_start = head_start
            times = measure(clock, contenders, self.rounds)
            self.add(group, model, elements, BYTES_PER_ELEMENT["first_step"] * elements, times, ["reference", "pytorch_optimizer"])

    def operations(self, model: str, dtype: torch.dtype) -> None:
        start = self.params(model, dtype)
        elements = sum(p.numel() for p in start)
        runs: dict[str, dict[str, Contender]] = {}
        for name in gpu_backends(self.device):
            optimizer = SAM(copies(start), lr=0.0, backend=name)
            optimizer.first_step()
            optimizer.restore()
            for operation, contender in operation_contenders(optimizer).items():
                runs.setdefault(operation, {"copy": self.copy})[name] = contender
        for operation, contenders in runs.items():
            moved = BYTES_PER_ELEMENT[operation] * dtype.itemsize // 4 * elements
            self.add(operation, f"{model} {str(dtype).removeprefix('torch.')}", elements, moved, measure(self.clock, contenders, self.rounds), [])

    def order_of_perturb(self, model: str) -> None:
        """Does it help that perturb starts with the gradients that grad_norm read last? Measured on the whole first_step."""
        if "cuda" not in gpu_backends(self.device):
            self.left_out.append("order of perturb: not run, the cuda backend cannot be used here")
            return
        for name in dict.fromkeys(("resnet18", "resnet50", model)):
            if name not in self.shapes:
                continue
            optimizer = SAM(self.params(name), lr=0.0, backend="cuda")
            backend: Any = backends.BACKENDS["cuda"]

            def run(reverse: bool, optimizer: SAM = optimizer, backend: Any = backend) -> None:
                backend.reverse = reverse
                optimizer.first_step()

            elements = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
            contenders = {
                "copy": self.copy,
                "backwards": Contender(lambda run=run: run(True), finish=optimizer.restore),
                "forwards": Contender(lambda run=run: run(False), finish=optimizer.restore),
            }
            try:
                times = measure(self.clock, contenders, self.rounds)
            finally:
                backend.reverse = type(backend).reverse
            self.add("order of perturb", name, elements, BYTES_PER_ELEMENT["first_step"] * elements, times, ["forwards"])

    def optimizer_step(self, model: str) -> None:
        start = self.params(model)
        elements = sum(p.numel() for p in start)
        contenders: dict[str, Contender] = {}
        for name in gpu_backends(self.device):
            optimizer = SAM(copies(start), torch.optim.SGD, **SGD, fused=True, backend=name)
            contenders[name] = Contender(lambda optimizer=optimizer: (optimizer.first_step(), optimizer.second_step()))
        for name, options in (("reference", SGD), ("reference with fused SGD", {**SGD, "fused": True})):
            reference = ReferenceSAM(copies(start), torch.optim.SGD, **options)
            contenders[name] = Contender(lambda reference=reference: (reference.first_step(), reference.second_step()))
        times = measure(self.clock, contenders, self.rounds)
        self.add("first_step + restore + SGD", model, elements, None, times, ["reference", "reference with fused SGD"])

    def host_time(self) -> None:
        """Seconds that first_step keeps the host busy for 161 parameters of 8 elements. The target is 60 us."""
        times: dict[str, list[float]] = {}
        for name in gpu_backends(self.device):
            params = [nn.Parameter(torch.rand(8, device=self.device)) for _ in range(161)]
            for p in params:
                p.grad = torch.rand_like(p)
            optimizer = SAM(params, lr=0.0, backend=name)
            times[name] = []
            for _ in range(20 * self.rounds):
                begin = time.perf_counter()
                optimizer.first_step()
                times[name].append(time.perf_counter() - begin)
                optimizer.restore()
                self.clock.synchronize()
            times[name] = times[name][20:]
        self.add("host time of first_step", "161 x 8", 161 * 8, None, times, [])


def peer_optimizer(params: list[nn.Parameter]) -> Contender | None:
    """pytorch_optimizer's SAM with its foreach option, where that package is installed."""
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return None
    from pytorch_optimizer import SAM as PeerSAM

    try:
        peer = PeerSAM(params, torch.optim.SGD, rho=0.05, lr=0.0, foreach=True)
    except TypeError:  # an older version
        peer = PeerSAM(params, torch.optim.SGD, rho=0.05, lr=0.0)
    backward = Backward(params)

    def finish() -> None:
        peer.second_step(zero_grad=True)
        backward()

    return Contender(peer.first_step, finish=finish)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda", help="cuda; or cpu, to try this program")
    parser.add_argument("--seconds", type=float, default=120.0, help="start no further case after so long")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and few rounds: does it run at all?")
    arguments = parser.parse_args()
    if arguments.smoke:
        bench = Bench(arguments.device, arguments.seconds, {"tiny": [[300, 7], [11], []]}, rounds=2, copy_bytes=1 << 16)
    else:
        bench = Bench(arguments.device, arguments.seconds, MODELS)
    bench.run()
    if importlib.util.find_spec("pytorch_optimizer") is None:
        bench.left_out.append("pytorch_optimizer's SAM: not run, the package is not installed")
    arguments.json.write_text(json.dumps({"figures": [asdict(f) for f in bench.figures], "left_out": bench.left_out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
