"""The pages that people read, and the command lines on them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
_HERE = re.compile(r"(<<-? ?'?(?P<end>\w+)'?[^\n]*\n).*?^(?P=end)$", re.DOTALL | re.MULTILINE)
_SEPARATORS = {"|", "&&", "||", ";", "&"}


@dataclass(frozen=True, slots=True)
class CommandLine:
    """One line of a page that a reader would type."""

    page: str
    line: str

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"

    def programs(self) -> Iterator[list[str]]:
        """The words of every program that the line starts, without variables and redirections.

        Raises:
            ValueError: the line is no line of a shell.
        """
        lexer = shlex.shlex(self.line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in _SEPARATORS:
                if found := _without_shell(words):
                    yield found
                words = []
            else:
                words.append(word)


def fences(text: str) -> Iterator[tuple[str, str]]:
    """Kind and text of every fenced block."""
    return ((found["kind"], found["text"]) for found in _FENCE.finditer(text))


def command_lines() -> Iterator[CommandLine]:
    """Every line of every block of bash, joined where it goes on."""
    for page in PAGES:
        for kind, text in fences(page.read_text(encoding="utf-8")):
            if kind == "bash":
                joined = _HERE.sub(r"\\1", text).replace("\\\n", " ")
                for line in joined.splitlines():
                    if line.strip() and not line.strip().startswith("#"):
                        yield CommandLine(page.name, line.strip())


def _without_shell(words: list[str]) -> list[str]:
    """What is started: variables that are set before it and redirections are the shell's."""
    kept: list[str] = []
    skips = False
    for word in words:
        if skips:
            skips = False
        elif re.fullmatch(r"\d?[<>]{1,2}-?", word):
            skips = True
        elif re.match(r"\d?[<>]{1,2}\S", word) or (not kept and re.match(r"[A-Za-z_]\w*=", word)):
            continue
        else:
            kept.append(word)
    return kept
