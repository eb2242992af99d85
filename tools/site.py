"""Additions to the site: a page for every table of ``docs/data``, links to files that are not pages, and
formulas.

Formulas become MathML while the site is built, so that browsers draw them without scripts, fonts or a network. Pages
write them as GitHub does: ``$`x_i`$`` within a line, and a fence named ``math`` for one on its own.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
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
        f"{len(rows)} rows, as a file: [{path.name}]({path.name}), {tables.makings()[path.stem]}.\n\n"
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


_INLINE = r"\$`([^`\n]+(?:\n[^`\n]+)*)`\$"


class Mathematics(Extension):  # type: ignore[misc]  # untyped for mypy
    """Formulas within lines of text; blocks are fences, see `formula_block`."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  # the name is the base class's
        md.inlinePatterns.register(_Formula(_INLINE, md), "formula", 200)  # before code, which uses backticks


class _Formula(InlineProcessor):  # type: ignore[misc]
    def handleMatch(  # noqa: N802
        self, m: re.Match[str], data: str
    ) -> tuple[Element | str, int, int]:
        return self.md.htmlStash.store(mathml(m[1], display="inline")), m.start(0), m.end(0)


def formula_block(source: str, language: str, class_name: str, options: Any, md: Any, **kwargs: Any) -> str:
    """Convert a fence named ``math``."""
    return f'<div class="formula">{mathml(source, display="block")}</div>'


def mathml(source: str, *, display: str) -> str:
    """Return LaTeX as MathML.

    Raises:
        ValueError: a command is unknown, and would be drawn as its own name.
    """
    one_line = " ".join(source.split()).replace("{aligned}", "{split}")  # the same, under the known name
    found = str(convert(one_line, display=display))
    if unknown := re.search(r"\\[A-Za-z]+|<mi>&</mi>", found):
        raise ValueError(f"{unknown[0]} in {source!r} is not understood")
    return re.sub(r'columnalign="(left|right)"', r'style="text-align: \1"', found)  # browsers only respect the style


def makeExtension(**kwargs: Any) -> Mathematics:  # noqa: N802
    """Return the extension; MkDocs calls this."""
    return Mathematics(**kwargs)
