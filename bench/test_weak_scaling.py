"""The optimizer's own time with as many processes as there are cores, relative to one: see weak_scaling.py."""

from __future__ import annotations

import os

import pytest
import torch

from bench.harness import Bench
from bench.records import Record
from bench.shapes import MODELS
from bench.weak_scaling import measured, named

GROUP = "weak scaling"


def test_weak_scaling(bench: Bench) -> None:
    """The quotient of both is the efficiency.

    Processes on one machine share its memory: the streaming copy shows what that costs.
    """
    most = torch.cuda.device_count() if bench.device == "cuda" else min(os.cpu_count() or 1, 2)
    if most == 1:
        pytest.skip("needs two cores, or two GPUs")
    rounds = {
        named(size): measured(size, MODELS["resnet18"], 3 if bench.smoke else 30, bench.device) for size in (1, most)
    }
    for case in rounds[named(1)]:
        bench.shown = bench.add(
            Record(GROUP, case, named(most), {name: by_case[case] for name, by_case in rounds.items()})
        )
