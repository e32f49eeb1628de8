"""Which tests show which guarantee: ``@pytest.mark.guarantee(id="...")``, read without importing anything.

The site puts them into docs/guarantees.md, whose tables have the same ids; test_guarantees.py compares the two.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@cache
def shown_by() -> dict[str, list[str]]:
    """Id of each guarantee -> its tests, as pytest names them."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = path.relative_to(ROOT).as_posix()
        for name, function in functions_of(file).items():
            for decorator in reversed(function.decorator_list):
                identity = guarantee_of(decorator)
                if identity is not None:
                    found.setdefault(identity, []).append(f"{file}::{name}")
    return found


@cache
def functions_of(file: str) -> dict[str, ast.FunctionDef]:
    """The functions of a file, and the methods of its classes as ``Class::method``."""
    found = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}::{method.name}": method for method in node.body if isinstance(method, ast.FunctionDef)
            }
    return found


def guarantee_of(decorator: ast.expr) -> str | None:
    if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) != "pytest.mark.guarantee":
        return None
    (keyword,) = decorator.keywords
    return str(ast.literal_eval(keyword.value))
