"""Which parameters: the shapes of real models, and two extremes."""

from __future__ import annotations

import json
import math
from pathlib import Path

MODELS: dict[str, list[list[int]]] = json.loads((Path(__file__).parent / "model_shapes.json").read_text())
"""Parameter shapes of real models, by model name."""

TINY, ONE = "10,000 tensors of 16", "one tensor of 100M"
SHAPES: dict[str, list[list[int]]] = {**MODELS, TINY: [[16]] * 10_000, ONE: [[100_000_000]]}


def elements(name: str) -> int:
    return sum(math.prod(shape) for shape in SHAPES[name])


LARGE = [name for name in MODELS if elements(name) >= 25_000_000]
"""Models that no cache holds: their bandwidth is the memory's."""


def shrink() -> None:
    """Make every set tiny, for a run that only shows that the suite works."""
    for shapes in (SHAPES, MODELS):
        for name in shapes:
            shapes[name] = [[min(n, 4) for n in shape] for shape in shapes[name][:5]]
