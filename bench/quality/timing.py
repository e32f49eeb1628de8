"""The contenders' time relative to SGD's, on an otherwise idle machine: ``python -m bench.quality time``."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import torch

from bench.quality.contenders import CONTENDERS, Trainer
from bench.quality.tasks import TASKS, split
from bench.records import ROOT, commit_and_date, processor
from examples.fashion_mnist.model import network

TIMES = ROOT / "bench" / "results" / "quality-time.json"
STEPS = 16
"""Steps of a miniature training: enough for each schedule's mix of steps."""


def measure(rounds: int, path: Path = TIMES) -> None:
    """Time a miniature training of each contender, and write the seconds. Each round draws the order anew."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, task in TASKS.items():
        data = split(task, 0)
        x, y = data.train_images[: task.batch], data.train_labels[: task.batch]
        model = network(data, 0)
        seconds[name] = {contender: [] for contender in CONTENDERS}
        for i in range(rounds + 1):
            for contender in random.sample(list(CONTENDERS), len(CONTENDERS)):
                chosen = CONTENDERS[contender]
                trainer = Trainer(model, chosen, steps=STEPS, rho=0.05, lr=1e-3, weight_decay=0.0)
                start = time.perf_counter()
                for _ in range(STEPS):
                    trainer.train_batch(x, y)
                if i:  # the first round warms up
                    seconds[name][contender].append(chosen.epochs * (time.perf_counter() - start))
    load = round(os.getloadavg()[0], 1)
    facts = {"processor": processor(), "torch": torch.__version__, "load average": load, **commit_and_date()}
    path.write_text(json.dumps({"machine": facts, "seconds": seconds}) + "\n")
