"""Trains small networks with random faults and resumes, next to undisturbed runs, for a number of minutes. Not part of
the test suite.

    OMP_NUM_THREADS=1 python tests/soak/run.py [--minutes 20] [--seed 0] [--out bench/results/soak.json]

In every round a network is trained twice on the same data: once undisturbed, once with faults. A fault is an exception
in the second pass, an interruption at a random call inside first_step or second_step, a batch of NaN, weights that are
given other memory, or a crash, after which all objects are made anew from the last checkpoint (``weights_only=True``),
as in a new process. Both runs must end with the same bits: weights, statistics and the optimizer's state. The memory of
the process and the number of live tensors must not grow. Ends with an error if either fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from boundaries import Boundaries
from cases import SmallNet, batches, same_bits

import sam_fast
from sam_fast import SAM, BatchNormSnapshot

STEPS = 60
CHECKPOINT_EVERY = 20
FAULT_RATE = 0.25
WARM_UP_ROUNDS = 8
MAX_GROWTH_MB = 8.0
"""How much the resident memory may grow from the first to the last quarter of the rounds. The allocator alone moves it
by a few MB.
"""

CONFIGURATIONS: list[dict[str, Any]] = [
    {"base_optimizer": torch.optim.SGD, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    {"base_optimizer": torch.optim.AdamW, "lr": 3e-3},
    {"base_optimizer": torch.optim.SGD, "lr": 0.05, "momentum": 0.9, "nesterov": True, "flatten": True},
    {"base_optimizer": torch.optim.AdamW, "lr": 3e-3, "amsgrad": True, "flatten": True},
    {"base_optimizer": torch.optim.RMSprop, "lr": 1e-3, "momentum": 0.5},
    {"base_optimizer": torch.optim.SGD, "lr": 0.05, "momentum": 0.9, "adaptive": True, "rho": 0.5, "eta": 0.01},
]
FAULTS = ("second pass", "first_step", "second_step", "nan", "moved", "crash")


class Fault(Exception):
    """Raised in a second pass."""


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.dropout(x))
        return out


class Training:
    """A network, its optimizer and the number of steps done."""

    def __init__(self, seed: int, configuration: dict[str, Any]) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.configuration = configuration
        self.model = Network()
        self.optimizer = SAM(self.model.parameters(), **configuration)
        self.data = batches(STEPS, batch=8, seed=seed)
        self.done = 0

    def first_pass(self, x: Tensor, y: Tensor) -> None:
        with self.optimizer.first_pass(self.model, replay_rng=True):
            cross_entropy(self.model(x), y).backward()

    def step(self, fault: str | None = None, rng: random.Random | None = None) -> bool:
        """One step; after a fault the same step is taken again. False if only the last checkpoint helps."""
        optimizer, model = self.optimizer, self.model
        x, y = self.data[self.done]
        torch.manual_seed(1000 * self.seed + self.done)
        statistics = BatchNormSnapshot(model)  # a step that is taken again must not count twice
        statistics.save()
        if fault is not None and not self.faulty(fault, rng or random.Random(0), x, y):
            return False
        if fault not in (None, "moved"):
            optimizer.restore()
            optimizer.zero_grad()
            statistics.restore()
            torch.manual_seed(1000 * self.seed + self.done)
        self.first_pass(x, y)
        optimizer.first_step(zero_grad=True)
        if fault == "moved":
            with torch.no_grad():
                for p in list(model.parameters())[::2]:
                    p.data = p.detach().clone()
        with optimizer.second_pass(model):
            cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        self.done += 1
        return True

    def faulty(self, fault: str, rng: random.Random, x: Tensor, y: Tensor) -> bool:
        """The step with the fault. False if it may have been taken in part."""
        optimizer, model = self.optimizer, self.model
        if fault in ("moved", "crash"):
            return fault != "crash"
        self.first_pass(x * float("nan") if fault == "nan" else x, y)
        interruption = Boundaries(rng.randrange(400), rng.choice([KeyboardInterrupt, MemoryError]))
        if fault == "first_step":
            interruption.run(lambda: optimizer.first_step(zero_grad=True))
            return True
        optimizer.first_step(zero_grad=True)
        if fault == "second pass":
            try:
                with optimizer.second_pass(model):
                    cross_entropy(model(x), y).backward()
                    raise Fault
            except Fault:
                assert not optimizer.perturbed
            return True
        with optimizer.second_pass(model):
            cross_entropy(model(x), y).backward()
        if fault == "second_step":
            interruption.run(lambda: optimizer.second_step(zero_grad=True))
            return False
        return True

    def save(self, file: Path) -> None:
        torch.save(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done}, file
        )

    @staticmethod
    def load(file: Path, seed: int, configuration: dict[str, Any]) -> Training:
        """Everything new, as in a new process."""
        training = Training(seed, configuration)
        state = torch.load(file, weights_only=True)
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.done = state["done"]
        return training

    def everything(self) -> list[Tensor]:
        states = [
            value
            for p in self.model.parameters()
            for value in self.optimizer.state.get(p, {}).values()
            if isinstance(value, Tensor)
        ]
        return [*self.model.parameters(), *self.model.buffers(), *states]


def disturbed(
    seed: int, configuration: dict[str, Any], rng: random.Random, file: Path, counts: Counter[str]
) -> Training:
    # A parameter that left its flat buffer takes the base optimizer's own step, which rounds its square root otherwise
    # (docs/differences.md).
    other_root = configuration.get("flatten") and configuration["base_optimizer"] is torch.optim.AdamW
    faults = [fault for fault in FAULTS if fault != "moved" or not other_root]
    training = Training(seed, configuration)
    training.save(file)
    while training.done < STEPS:
        fault = rng.choice(faults) if rng.random() < FAULT_RATE else None
        counts[fault or "none"] += 1
        if not training.step(fault, rng):
            training = Training.load(file, seed, configuration)
            counts["resumed"] += 1
        elif training.done % CHECKPOINT_EVERY == 0:
            training.save(file)
    return training


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


def soak(minutes: float, seed: int, report: Callable[[str], None]) -> dict[str, Any]:
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    memory: list[float] = []
    tensors: list[int] = []
    differing: list[int] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() - begin < 60 * minutes or len(memory) < 2 * WARM_UP_ROUNDS:
            number = len(memory)
            configuration = CONFIGURATIONS[number % len(CONFIGURATIONS)]
            undisturbed = Training(seed + number, configuration)
            while undisturbed.done < STEPS:
                undisturbed.step()
            other = disturbed(seed + number, configuration, rng, Path(folder) / "checkpoint.pt", counts)
            if not same_bits(undisturbed.everything(), other.everything()):
                differing.append(number)
            del undisturbed, other
            tensors.append(live_tensors())
            memory.append(resident_mb())
            if number % 20 == 0:
                report(
                    f"round {number}: {memory[-1]:.1f} MB, {tensors[-1]} tensors, {len(differing)} rounds with other "
                    f"bits, {dict(counts)}"
                )
    after = memory[WARM_UP_ROUNDS:]
    quarter = max(1, len(after) // 4)
    growth = statistics.median(after[-quarter:]) - statistics.median(after[:quarter])
    return {
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round((time.monotonic() - begin) / 60, 2),
        "seed": seed,
        "rounds": len(memory),
        "steps per round, each of the two runs": STEPS,
        "faults": {name: counts[name] for name in FAULTS},
        "resumed from a checkpoint": counts["resumed"],
        "rounds that ended with other bits": differing,
        "resident memory, MB, every 10th round": [round(m, 1) for m in memory[::10]],
        "growth from the first to the last quarter after warm-up, MB": round(growth, 2),
        "live tensors after the first and last round": [tensors[0], tensors[-1]],
        "passed": not differing and growth <= MAX_GROWTH_MB and tensors[-1] <= max(tensors[:WARM_UP_ROUNDS]),
        "sam_fast": sam_fast.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of networks, data and faults (default: 0)")
    out = Path(__file__).resolve().parents[2] / "bench" / "results" / "soak.json"
    parser.add_argument("--out", type=Path, default=out, help="the result (default: bench/results/soak.json)")
    arguments = parser.parse_args()
    result = soak(arguments.minutes, arguments.seed, lambda line: print(line, flush=True))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(not result["passed"])


if __name__ == "__main__":
    main()
