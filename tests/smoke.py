"""Is an installed sam_fast whole? Needs the package, PyTorch and threadpoolctl; `make wheel` and cibuildwheel run it.

    python tests/smoke.py --first torch --need cpu

takes steps on every backend that is usable, compares them with plain PyTorch in float64, and counts OpenMP runtimes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

RHO, RATE, MOMENTUM, STEPS = 5.0, 0.01, 0.9, 3
# The last has a tail that fills no vector, and enough elements for two threads.
SHAPES = ((3,), (17, 5), (100003,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", choices=("torch", "sam_fast"), default="torch", help="what is imported first")
    parser.add_argument("--need", nargs="*", default=[], metavar="BACKEND", help="backends that must be usable")
    arguments = parser.parse_args()
    importlib.import_module(arguments.first)
    import threadpoolctl
    import torch

    import sam_fast

    installed = Path(sam_fast.__file__)
    assert installed.parents[1] != Path(__file__).parents[1], f"{installed} is a checkout, not an installation"
    torch.set_num_threads(2)
    usable = sam_fast.backends.available()
    assert set(arguments.need) <= set(usable), sam_fast.backends.why_not()
    for backend in usable:
        device = "cpu" if backend in ("cpu", "torch") or not torch.cuda.is_available() else "cuda"
        print(f"{backend} on {device}: furthest from float64 {compare(backend, device):.1e}")
    runtimes = [pool["filepath"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "openmp"]
    print("OpenMP runtimes:", *runtimes)
    assert len(runtimes) == 1
    print(f"fine: sam_fast {sam_fast.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}")


def compare(backend: str, device: str) -> float:
    """Three steps of SAM with SGD on this backend, and the same by hand in float64: the largest difference."""
    import torch

    from sam_fast import SAM

    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    params = [torch.nn.Parameter(w.clone().to(device)) for w in start]
    exact, buffers = [w.double() for w in start], [torch.zeros(w.shape, dtype=torch.float64) for w in start]
    optimizer = SAM(params, torch.optim.SGD, rho=RHO, lr=RATE, momentum=MOMENTUM, backend=backend)
    for _ in range(STEPS):
        # The loss is sum(w^4) / 4: the gradient w^3 tells where it was taken.
        for step in (optimizer.first_step, optimizer.second_step):
            sum(p.pow(4).sum() / 4 for p in params).backward()
            step(zero_grad=True)
        grads = [w**3 for w in exact]
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        for w, g, buffer in zip(exact, grads, buffers, strict=True):
            buffer.mul_(MOMENTUM).add_((w + RHO * g / norm) ** 3)
            w.sub_(RATE * buffer)
    furthest = max(float((p.detach().cpu().double() - w).abs().max()) for p, w in zip(params, exact, strict=True))
    assert furthest < 1e-5, furthest
    return furthest


if __name__ == "__main__":
    main()
