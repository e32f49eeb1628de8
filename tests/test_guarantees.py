"""docs/guarantees.md and docs/integrations.md name tests that exist."""

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


# ---- docs/integrations.md --------------------------------------------------------------------------------------------

INTEGRATIONS = (ROOT / "docs" / "integrations.md").read_text()
NAMES = re.compile(r"`(tests/)?(test_\w+\.py)::(test_\w+)`")


def test_every_row_of_integrations_names_tests_that_exist() -> None:
    rows = re.findall(r"^\|.*\|$", INTEGRATIONS.split("\n## What shows it\n")[1], re.MULTILINE)[2:]
    assert len(rows) > 50
    for row in rows:
        named = NAMES.findall(row)
        assert named, row
        for folder, file, name in named:
            assert name in functions_of(f"{folder or 'tests/integrations/'}{file}"), row


def test_integrations_names_the_versions_that_are_tested() -> None:
    lines = (ROOT / "tests" / "integrations" / "requirements.txt").read_text().splitlines()
    pins = [re.sub(r"\[.*\]", "", line).replace("==", " ") for line in lines if "==" in line]
    beside = {"datasets", "torchmetrics"}  # needed by another one's tests
    assert [pin for pin in pins if pin not in INTEGRATIONS and pin.split()[0] not in beside] == []
