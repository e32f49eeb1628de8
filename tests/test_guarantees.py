"""docs/guarantees.md and the tests that are marked with its ids."""

from __future__ import annotations

import re

from guarantees import ROOT, shown_by

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
