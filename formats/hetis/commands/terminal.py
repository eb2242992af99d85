"""The output of a verb: data on stdout in one of three forms, everything else on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


WIDE = 1000  # in characters: lines that are not folded
NARROW = 80  # of what is read as text where there is no terminal: pipes, files, logs

# Replacements for streams that cannot encode the symbols of a table, so that a box does not become question marks. Each
# shade has its own, since charts tell their parts apart by them.
_ASCII = str.maketrans(
    {
        **dict.fromkeys("█▉▊▋▌", "#"), **dict.fromkeys("▍▎▏", "."), "▓": "%", "▒": "o", "░": ":",
        **dict.fromkeys("━─╌–−", "-"), **dict.fromkeys("┃│", "|"), **dict.fromkeys("└├╰╭╮╯┌┐┘", "+"),
        "×": "x", "·": ".", "•": "*", "…": "...", "→": "->", "±": "+-", "≥": ">=", "≤": "<=",
    }
)  # fmt: skip

_COERCED = ("C.UTF-8", "C.utf8")


class OutputFormat(StrEnum):
    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """The two output streams of a verb, and the options that control them."""

    output: OutputFormat = OutputFormat.TABLE  # form of the data on stdout
    verbosity: int = 0  # -1 errors only, 0 normal, 1 with details
    color: bool = True  # False after ``--no-color``; ``NO_COLOR`` and streams other than terminals have the same effect

    @property
    def prints_tables(self) -> bool:
        """Return whether data is for a reader rather than for programs."""
        return self.output in (OutputFormat.TABLE, OutputFormat.WIDE)

    @property
    def is_wide(self) -> bool:
        """Return whether tables have all columns, however wide."""
        return self.output is OutputFormat.WIDE

    def emit(
        self, document: Callable[[], Any], table: Callable[[], RenderableType], *, width: int | None = None
    ) -> None:
        """Print data on stdout: ``document`` (JSON values) or ``table``, according to the output format.

        ``width`` is that of the table, in characters; None: that of the terminal, or `NARROW` if stdout is none. Lines
        are not folded with ``-o wide``.
        """
        if self.prints_tables:
            console = self._console(sys.stdout, WIDE if width is None and self.is_wide else width)
            with console.capture() as captured:
                console.print(table())
            lines = "".join(f"{line.rstrip(' ')}\n" for line in captured.get().splitlines())
            _write_all(lines.translate(_ASCII) if _asks_for_ascii() else lines)
            return
        from hetis.formats.documents import dump_data

        _write_all(dump_data(document(), "json" if self.output is OutputFormat.JSON else "yaml"))

    def write(self, text: str) -> None:
        """Write a whole document to stdout as it is."""
        _write_all(text)

    def say(self, message: str) -> None:
        """Print a line of information on stderr, unless ``-q`` silences it."""
        if self.verbosity >= 0:
            self.line(message)

    def detail(self, message: str) -> None:
        """Print a line that only ``-v`` shows."""
        if self.verbosity >= 1:
            self.line(message)

    def warn(self, message: str) -> None:
        """Print a warning about something that is not an error."""
        if self.verbosity >= 0:
            self.line(message, label="warning", style="yellow")

    def error(self, message: str, details: Iterable[str] = ()) -> None:
        """Print an error with one detail per line below it. Always shown."""
        self.line(message, label="error", style="bold red")
        for detail in details:
            self.line(f"  {detail}")

    def line(self, message: str, *, label: str = "", style: str = "") -> None:
        """Print a line that is always shown, such as one of many problems."""
        from rich.text import Text

        # Soft wrap: a message that may be copied or searched for must stay one line.
        text = Text.assemble((f"{label}: " if label else "", style), message)
        self._console(sys.stderr).print(text, soft_wrap=True)

    def stderr_console(self) -> Console:
        """Return the console on stderr, for progress."""
        return self._console(sys.stderr)

    def _console(self, stream: TextIO, width: int | None = None) -> Console:
        from rich.console import Console

        if width is None and not stream.isatty() and "COLUMNS" not in os.environ:
            width = NARROW if stream is sys.stdout else WIDE  # messages stay one line each
        # Without a colour system there is no bold or dim either, so plain text is plain.
        system: Literal["auto"] | None = "auto" if self.color and not os.environ.get("NO_COLOR") else None
        return Console(file=stream, width=width, color_system=system, highlight=False, emoji=False, markup=False)


in_use: ContextVar[Terminal | None] = ContextVar("in_use", default=None)
"""The terminal of the running verb, for messages after it has failed."""


def _asks_for_ascii() -> bool:
    """Return whether the locale is C or POSIX, where Python still writes UTF-8. An unset locale does not count."""
    named = os.environ.get
    # Python itself sets LC_CTYPE to C.UTF-8 if LANG is C (PEP 538), so that value is not the user's choice.
    kind = None if named("LC_CTYPE") in _COERCED else named("LC_CTYPE")
    return (named("LC_ALL") or kind or named("LANG")) in ("C", "POSIX")


class _AsciiStream:
    """A text stream that converts text to ASCII. Bytes written to its buffer pass unchanged."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text.translate(_ASCII))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def plain_streams() -> Iterator[None]:
    """Make help, usage errors and messages ASCII, whatever prints them, if the locale asks for ASCII."""
    if not _asks_for_ascii():
        yield
        return
    with redirect_stdout(_AsciiStream(sys.stdout)), redirect_stderr(_AsciiStream(sys.stderr)):
        yield


def _write_all(text: str) -> None:
    """Write to stdout until everything is written or an error is raised.

    Under PYTHONUNBUFFERED a text stream passes its bytes to the system once and drops those that were not accepted, so
    a full disk or a closed pipe would pass for success.
    """
    sys.stdout.flush()
    if not sys.stdout.encoding.lower().startswith("utf"):
        text = text.translate(_ASCII)
    rest = memoryview(text.encode(sys.stdout.encoding, errors=sys.stdout.errors or "strict"))
    while rest:
        rest = rest[sys.stdout.buffer.write(rest) :]
    sys.stdout.buffer.flush()
