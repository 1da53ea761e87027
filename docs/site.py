"""How do the project's pages become a site?

This is a hook of mkdocs; ``make site`` builds it.

The pages are written to be read beside the code, and link to it. On the site there is no code beside them: a link to a
file of the project becomes the file's name, and the README's relatives that live elsewhere become pages of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
#: page of the site -> where it lies.
ELSEWHERE = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie elsewhere; the benchmarks' with the README's measured tables."""
    for page, source in ELSEWHERE.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        if page == "benchmarks.md":
            content = f"{content}\n{_section('Speed').replace('(benchmarks/README.md)', '(README.md)')}"
        files.append(File.generated(config, page, content=content))
    return files


def _section(heading: str) -> str:
    """One section of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text.index(f"## {heading}\n")
    return text[start : text.index("\n## ", start)]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to what is no page of the site into plain text."""
    home = (ROOT / ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    pages = {(ROOT / source).resolve(): name for name, source in ELSEWHERE.items()}

    def turned(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match.group(0)
        there = (home / path).resolve()
        inside = there.is_relative_to(ROOT / "docs") and there.suffix == ".md"
        name = pages.get(there) or (str(there.relative_to(ROOT / "docs")) if inside else None)
        if there == ROOT / "README.md":
            name = "index.md"
        if name is None:
            return text if text.startswith("`") else f"`{text}`" if "/" in text or "." in text else text
        relative = posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{text}]({relative}{'#' + anchor if anchor and inside else ''})"

    return LINK.sub(turned, markdown)
