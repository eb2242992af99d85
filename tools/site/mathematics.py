r"""Formulas as MathML, made while the site is built, so that browsers draw them without scripts, fonts or a network.

Pages write formulas as GitHub does: ``$`x_i`$`` within a line, and a fence named ``math`` for one on its own.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor

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
    """Called by MkDocs."""
    return Mathematics(**kwargs)
