"""The host's part of the cuda backend, measured without a GPU: everything up to the driver's launch call, which is
replaced by nothing.

    python -m bench.launch_path

This is not the time on a GPU: there each of the two launches of first_step adds what the driver takes for it. It shows
what this project's own code costs. The kernels come from tests/cuda_emulation, compiled with optimization, and launches
are counted and left out.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
ROUNDS = 1000


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    module = ROOT / "build" / "launch-path" / "_cuda.so"
    importlib.import_module("cuda_emulation.build").build(module, optimize=3)
    os.environ["SAM_FAST_EMULATED_CUDA"] = str(module)
    importlib.import_module("cuda_emulation.plugin")
    library = ctypes.CDLL(str(module))
    launches = ctypes.c_int64.in_dll(library, "sam_emulation_launches")
    ctypes.c_int64.in_dll(library, "sam_emulation_skip").value = 1

    from sam_fast import SAM

    print(f"torch {torch.__version__}; launches do nothing; median us of {ROUNDS} rounds (quartiles)")
    print(f"{'parameters of 8 elements':28s} {'first_step':>24s} {'launches':>9s} {'restore':>24s} {'launches':>9s}")
    for number, flatten in [(1, False), (161, False), (161, True), (800, False), (1600, False)]:
        params = [nn.Parameter(torch.rand(8)) for _ in range(number)]
        for p in params:
            p.grad = torch.rand(8)
        optimizer = SAM(params, lr=0.0, flatten=flatten, backend="cuda")
        columns = []
        for half in (0, 1):
            times, count = [], 0
            for _ in range(ROUNDS):
                if half:
                    optimizer.first_step()
                before, begin = launches.value, time.perf_counter()
                (optimizer.restore if half else optimizer.first_step)()
                times.append(1e6 * (time.perf_counter() - begin))
                count = launches.value - before
                if not half:
                    optimizer.restore()
            low, middle, high = statistics.quantiles(times, n=4)
            columns.append(f"{middle:8.1f} ({low:.1f} - {high:.1f})".rjust(24) + f" {count:9d}")
        case = f"{number}, flatten" if flatten else str(number)
        print(f"{case:28s} {columns[0]} {columns[1]}")


if __name__ == "__main__":
    main()
