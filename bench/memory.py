"""Peak memory of a few training steps of one contender, printed in bytes; run in a process of its own, since a peak
never goes down.

python -m bench.memory CONTENDER [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.peers import FOREACH, PEER_FOREACH, PEER_LOOP, REFERENCE, ForeachSAM
from sam_fast import SAM as FastSAM
from sam_fast.reference import ReferenceSAM

SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
PLAIN = "SGD"
CONTENDERS = (PLAIN, "sam_fast", "sam_fast, flatten", REFERENCE, PEER_LOOP, PEER_FOREACH, FOREACH)
DEFAULT = CONTENDERS[:4]
WIDTH, LAYERS, BATCH = 2048, 8, 8
CASE, ELEMENTS = f"{LAYERS} linear layers of {WIDTH}", LAYERS * (WIDTH * WIDTH + WIDTH)


def make(contender: str, params: list[nn.Parameter]) -> Any:
    base = torch.optim.SGD

    def peer(**extra: Any) -> Any:
        from pytorch_optimizer import SAM as PeerSAM

        return PeerSAM(params, base, **SGD, **extra)

    makers: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: base(params, fused=True, **SGD),
        "sam_fast": lambda: FastSAM(params, base, **SGD),
        "sam_fast, flatten": lambda: FastSAM(params, base, flatten=True, **SGD),
        REFERENCE: lambda: ReferenceSAM(params, base, **SGD),
        PEER_LOOP: lambda: peer(**({"fused": True} if params[0].device.type == "cpu" else {"foreach": False})),
        PEER_FOREACH: lambda: peer(foreach=True),
        FOREACH: lambda: ForeachSAM(params, base, 0.05, False, fused=True, **SGD),
    }
    return makers[contender]()


def resident() -> int:
    """Peak resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss is at least what the parent had when it started this process
        return 1024 * next(
            int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_bytes(contender: str, device: str) -> int:
    """What three training steps need beyond what there was before the model."""
    torch.manual_seed(0)
    if contender in (PEER_LOOP, PEER_FOREACH):
        import pytorch_optimizer  # noqa: F401  # its own memory is not the step's
    x = torch.randn(BATCH, WIDTH, device=device)
    warm_up = nn.Linear(WIDTH, 64, device=device)
    warm_up(x).sum().backward()
    before = resident() if device == "cpu" else torch.cuda.memory_allocated()
    model = nn.Sequential(
        *(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH, device=device), nn.ReLU()))
    )
    optimizer = make(contender, list(model.parameters()))
    for _ in range(3):
        model(x).square().mean().backward()
        if contender == PLAIN:
            optimizer.step()
        else:
            optimizer.first_step()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.second_step()
        optimizer.zero_grad()
    return (resident() if device == "cpu" else torch.cuda.max_memory_allocated()) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    print(peak_bytes(arguments.contender, arguments.device))


if __name__ == "__main__":
    main()
