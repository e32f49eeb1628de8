"""What the site has and the Markdown files, as GitHub shows them, have not.

- docs/start.md is the home page.
- A link to a file of the repository outside docs/ leads to a page of the site with that file.
- docs/guarantees.md names the tests that are marked with the ids in its tables.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)\)")
ROW = re.compile(r"^\| `([\w-]+)` \| (.*) \|$", re.MULTILINE)

sys.path.insert(0, str(ROOT / "tests"))
from guarantees import shown_by  # noqa: E402


def on_files(files: Files, config: Any) -> None:
    start = files.get_file_from_path("start.md")
    assert start is not None
    files.remove(start)
    home = File("start.md", start.src_dir, config.site_dir, config.use_directory_urls, dest_uri="index.html")
    home.name = "index"
    files.append(home)
    linked = {path for file in files.documentation_pages() for path in OUTSIDE.findall(file.content_string)}
    for path in sorted(linked):
        files.append(File.generated(config, page_of(path), content=as_page(path)))


def page_of(path: str) -> str:
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def as_page(path: str) -> str:
    if not (ROOT / path).is_file():
        raise PluginError(f"a page of docs/ links to ../{path}, which does not exist")
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text.replace("](docs/", "](../")
    return f"---\nhide: [toc]\n---\n# {path}\n\n```{Path(path).suffix[1:]}\n{text}```\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    if page.file.src_uri.startswith("source/"):
        return markdown
    markdown = OUTSIDE.sub(lambda match: f"]({page_of(match[1])})", markdown)
    if page.file.src_uri == "guarantees.md":
        markdown = ROW.sub(with_tests, markdown).replace(
            "| id | guarantee | not guaranteed |\n|---|", "| guarantee | not guaranteed | tests |\n|---|"
        )
    return markdown


def with_tests(row: re.Match[str]) -> str:
    tests = shown_by().get(row[1])
    if tests is None:
        raise PluginError(f"docs/guarantees.md: no test is marked with guarantee(id={row[1]!r})")
    count = f"{len(tests)} test{'s' * (len(tests) > 1)}"
    names = "<br>".join(f"<code>{name}</code>" for name in (f"id={row[1]}", *tests))
    return f"| {row[2]} | <details><summary><span>{count}</span></summary>{names}</details> |"
