"""The pages that people read first: their code runs, their figures are the reports', and nothing public is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sam_fast

DOCS = Path(__file__).parent.parent / "docs"

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="runs from a checkout")


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a page, each a list of rows by column; figures without their intervals, names without stars."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = [[cell.strip(" *") for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        cut = [[re.sub(r" \(.*\)$", "", cell) for cell in row] for row in rows]
        found.append([dict(zip(header, row, strict=True)) for row in cut])
    return found


def page(name: str) -> str:
    return (DOCS / name).read_text()


def test_the_code_of_the_first_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page("start.md"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "start.md", "exec"), names)
    assert len(re.findall(r"loss \d\.\d+, sharpness -?\d\.\d+\n", capsys.readouterr().out)) == 8


def test_everything_public_is_on_the_page_of_the_api() -> None:
    listed = set(re.findall(r"^::: sam_fast\.(\w+)$", page("api.md"), re.MULTILINE))
    assert set(sam_fast.__all__) <= listed


def test_every_method_of_sam_is_on_the_page_of_the_api() -> None:
    listed = re.findall(r"^        - (\w+)$", page("api.md"), re.MULTILINE)
    classes = [c for c in sam_fast.SAM.__mro__ if c.__module__.startswith("sam_fast.")]
    public = {name for c in classes for name in vars(c) if not name.startswith("_")}
    with_words = {
        name for name in public if getattr(sam_fast.SAM, name).__doc__ and name not in ("state", "param_groups")
    }
    assert set(listed) == with_words - {"grad_scale", "found_inf"}


def test_the_costs_of_variants_are_those_of_the_report() -> None:
    (quoted,) = [table for table in tables(page("cost.md")) if "passes" in table[0]]
    assert len(quoted) >= 5
    for task, accuracy, time in (("A", "accuracy on A", "time on A"), ("B", "accuracy on B", "time on B")):
        section = page("quality.md").split(f"\n## Task {task}\n")[1].split("\n## ")[0]
        rows = {row["contender"]: row for table in tables(section) for row in table}
        for row in quoted:
            measured = rows[row["contender"]]
            assert (row["passes"], row[accuracy], row[time]) == (
                measured["cost"],
                measured["accuracy, %"],
                measured["time"],
            )


def test_the_price_of_an_iteration_is_that_of_the_report() -> None:
    quoted = re.findall(r"^\| ([^|]*, batch \d+) \| ([^|]+) \| ([\d.]+) \|$", page("cost.md"), re.MULTILINE)
    assert len(quoted) >= 4
    for network, own, reference in quoted:
        rows = re.findall(rf"^\| {re.escape(network)} +\|.*$", page("benchmarks.md"), re.MULTILINE)
        assert [row for row in rows if f"| {own} " in row and f"| {reference} (" in row], network
