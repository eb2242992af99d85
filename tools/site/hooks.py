"""MkDocs hooks: a page for every table of ``docs/data``, and links to files that are not pages."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from tools import tables

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#\s]*)(?:#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add a page with the full content of every table."""
    for path in sorted(tables.DATA.glob("*.csv")):
        source = f"data/{path.stem}.md"
        files.append(File.generated(config, source, content=data_page(path)))
    return files


def data_page(path: Path) -> str:
    """Return the page with a full table, and the file to download."""
    rows = tables.read(path.stem)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell or str())}</td>' for cell in row.values())}</tr>\n" for row in rows
    )
    return (
        f"---\nsearch:\n  exclude: true\n---\n# {path.stem}\n\n"
        f"{len(rows)} rows, as a file: [{path.name}]({path.name}).\n\n"
        f'<div class="table-whole"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'
    )


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace links to files of the repository by their names, and link to the pages of tables."""
    deep = page.file.src_uri.count("/")

    def outside(link: re.Match[str]) -> str:
        ups = link[0].partition("](")[2].count("../")
        if ups <= deep:
            return link[0]
        text, path = link[1], link[2].rstrip("/")
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    text = _OUTSIDE.sub(outside, markdown)
    return (
        text if page.file.src_uri.startswith("data/") else re.sub(r"\]\(data/([\w-]+)\.csv\)", r"](data/\1.md)", text)
    )
