"""docs/architecture.md: the files it names exist, and imports point down as its picture has them. The mutation suite:
what it breaks exists.
"""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "sam_fast"


@pytest.mark.skipif(not PAGE.is_file(), reason="runs from a checkout")
def test_every_file_that_the_page_names_exists() -> None:
    named = set(re.findall(r"\b(?:sam_fast|csrc|kernels|tests)/[\w/]*(?:\.\w+)?", PAGE.read_text()))
    assert len(named) > 25
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="runs from a checkout")
def test_what_the_mutation_suite_breaks_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "mutation")
    breakages = [
        *import_module("breakages_of_kernels").OF_KERNELS,
        *import_module("breakages_of_optimizer").OF_OPTIMIZER,
    ]
    stale = [b.name for b in breakages if (ROOT / b.file).read_text().count(b.original) != 1]
    for breakage in breakages:
        for test in breakage.tests:
            file, _, name = test.partition("::")
            path = ROOT / "tests" / file
            if not path.is_file() or not re.search(rf"^(def|class) {name}", path.read_text(), re.MULTILINE):
                stale.append(test)
    assert stale == []


def imports(path: Path) -> set[str]:
    """The package's own modules that a module imports, as dotted names below ``sam_fast``."""
    found = set()
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level]
            module = (*base, *(node.module.split(".") if node.module else ()))
            candidates = [module, *((*module, name.name) for name in node.names)]
            found |= {".".join(candidate) for candidate in candidates if candidate}
    return found


def test_there_is_no_circle_of_imports_not_even_for_types() -> None:
    files = [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.parts]
    modules = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in files}
    graph = {name: {other for other in imports(path) if other in modules} for name, path in modules.items()}
    # A package stands for its __init__, which nobody inside it imports.
    for name in [name for name in graph if name.endswith("__init__") and name != "__init__"]:
        package = name.removesuffix(".__init__")
        for other, targets in graph.items():
            if other != name and not other.startswith(f"{package}.") and package in imports(modules[other]):
                targets.add(name)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) > 30


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="runs from a checkout")
def test_no_file_of_the_product_has_outgrown_400_lines() -> None:
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}
