"""The hand-written pages, and the command lines on them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
_OUTPUT = re.compile(r"^<!-- output of (?P<line>[^\n]+) -->\n```\w*\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE)
_HERE = re.compile(r"(<<-? ?'?(?P<end>\w+)'?[^\n]*\n).*?^(?P=end)$", re.DOTALL | re.MULTILINE)
_SEPARATORS = {"|", "&&", "||", ";", "&"}


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A line of a page that a reader would type."""

    page: str
    line: str

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"

    def programs(self) -> Iterator[list[str]]:
        """Yield the words of every program that the line starts, without variables and redirections.

        Raises:
            ValueError: the line is not a shell command.
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
    """Yield kind and text of every fenced block."""
    return ((found["kind"], found["text"]) for found in _FENCE.finditer(text))


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def outputs() -> dict[CommandLine, list[str]]:
    """Return what pages show of the output of command lines, by ``<!-- output of LINE -->`` before the block."""
    found: dict[CommandLine, list[str]] = {}
    for page in PAGES:
        for shown in _OUTPUT.finditer(page.read_text(encoding="utf-8")):
            found.setdefault(CommandLine(page.name, shown["line"]), []).append(shown["text"])
    return found


def command_lines(*, is_with_runbook: bool = True) -> Iterator[CommandLine]:
    """Yield every line of every bash block, with continued lines joined."""
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        for kind, text in fences(content if is_with_runbook else content.replace(_runbook_of(content), "")):
            if kind == "bash":
                joined = _HERE.sub(r"\\1", text).replace("\\\n", " ")
                for line in joined.splitlines():
                    if line.strip() and not line.strip().startswith("#"):
                        yield CommandLine(page.name, line.strip())


RUNBOOK = "From installation to recovery, in commands"
_BLOCK = re.compile(r"[Oo]n ((?:`[a-z0-9-]+`(?:, )?)+)[^`]*?:\n\n```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


def runbook() -> Iterator[tuple[list[str], str]]:
    """Yield the blocks of the runbook in order, each with the machines on which it runs one after another."""
    section = _runbook_of((ROOT / "docs" / "operations.md").read_text(encoding="utf-8"))
    found = _BLOCK.findall(section)
    assert len(found) == section.count("```bash"), "a block says on no machine where it runs"
    yield from ((re.findall(r"`([a-z0-9-]+)`", names), block) for names, block in found)


def _runbook_of(text: str) -> str:
    return text.partition(f"## {RUNBOOK}\n")[2].partition("\n## ")[0]


def _without_shell(words: list[str]) -> list[str]:
    """Return the program's words, without the shell's variable assignments and redirections."""
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
