"""The blocks of code of docs/integrations.md, for tests that execute them as they stand there."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sam_fast import SAM, TrainStep, unwrap

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def recipes(heading: str, language: str = "python") -> list[str]:
    """The blocks of code under a heading of the page."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def run(heading: str, number: int = 0, **names: Any) -> dict[str, Any]:
    """Execute a block and return the names that it has made."""
    namespace = {"torch": torch, "SAM": SAM, "TrainStep": TrainStep, "unwrap": unwrap, "partial": partial, **names}
    code = recipes(heading)[number]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15  # formatting adds empty ones
    exec(compile(code, f"{PAGE.name}, {heading}", "exec"), namespace)
    return namespace


def framework(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: make test-integrations", exc_type=ImportError)
