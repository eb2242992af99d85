"""Markdown of the generated pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MADE = "<!-- Made by `make reference` from the code; do not edit. -->\n"


def page(parts: Iterable[str]) -> str:
    return MADE + "\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def heading(title: str, text: str) -> str:
    return f"# {title}\n\n{text}\n"


def fence(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines) + "\n"


def code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


def prose(text: str) -> str:
    """Return one line of Markdown from a docstring or a help text."""
    line = " ".join(text.replace("``", "`").replace("\\[", "[").split())
    return re.sub(r"(`[^`]*`)|([<>|*_{])", lambda m: m[1].replace("|", "\\|") if m[1] else _escape(m[2]), line)


def _escape(sign: str) -> str:
    return {"<": "&lt;", ">": "&gt;"}.get(sign, f"\\{sign}")


def slug(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")
