"""docs/guarantees.md names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", TEXT)))


@cache
def functions_of(file: str) -> set[str]:
    found = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return {name for name in found if name.split("::")[-1].startswith("test_")}


def test_every_named_test_exists() -> None:
    assert len(NAMED) > 80
    missing = [
        f"{file}::{name}" for file, name in NAMED if not (ROOT / file).is_file() or name not in functions_of(file)
    ]
    assert not missing


def test_every_row_names_a_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("|") and not re.match(r"\|(---|\s*guarantee)", line)]
    assert len(rows) > 50
    assert [row for row in rows if "::test_" not in row] == []
