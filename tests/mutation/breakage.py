"""What ``run.py`` breaks: a text of a source, what it is replaced with, and the smallest set of tests that must
notice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Breakage:
    name: str
    file: str
    original: str
    broken: str
    tests: tuple[str, ...]
