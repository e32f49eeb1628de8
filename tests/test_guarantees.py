"""docs/guarantees.md and the tests that are marked with its ids; the tests that docs/integrations.md names."""

from __future__ import annotations

import re

from guarantees import ROOT, functions_of, shown_by

PAGE = (ROOT / "docs" / "guarantees.md").read_text()
IDS = re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE)


def test_every_guarantee_has_a_test_and_every_marked_test_a_guarantee() -> None:
    assert len(IDS) == len(set(IDS)) > 80
    shown = shown_by()
    assert sorted(shown) == sorted(IDS)
    assert sum(map(len, shown.values())) > 190


def test_only_tests_are_marked() -> None:
    marked = {name.split("::")[-1] for names in shown_by().values() for name in names}
    assert [name for name in marked if not name.startswith("test_")] == []


def test_every_row_has_an_id_and_names_no_test_by_hand() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and not re.match(r"\| id |\|---", line)]
    assert len(rows) == len(IDS)
    assert ".py::" not in PAGE


# ---- docs/integrations.md --------------------------------------------------------------------------------------------

INTEGRATIONS = (ROOT / "docs" / "integrations.md").read_text()
NAMES = re.compile(r"`(tests/)?(test_\w+\.py)::(test_\w+)`")


def test_every_row_of_integrations_names_tests_that_exist() -> None:
    rows = re.findall(r"^\|.*\|$", INTEGRATIONS.split("\n## Tests\n")[1], re.MULTILINE)[2:]
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
