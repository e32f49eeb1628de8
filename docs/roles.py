"""Sphinx's roles in docstrings (:class:`sam_fast.SAM`) as links of the site, and its ``::`` as a colon."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth):`([\w.]+)`")


class Roles(griffe.Extension):
    """Names of the package become links, which the build checks; others are left as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(lambda role: link(obj, role[1]), obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)


def link(obj: griffe.Object, name: str) -> str:
    path = name
    if not name.startswith("sam_fast."):
        try:
            path = obj.resolve(name)
        except griffe.NameResolutionError:
            return f"`{name}`"
    return f"[`{name.removeprefix('sam_fast.')}`][{path}]" if path.startswith("sam_fast.") else f"`{name}`"
