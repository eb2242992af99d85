"""A spinner on a terminal for what takes a while; nothing anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hetis.formats.command_line.terminal import Terminal


@contextmanager
def waiting(terminal: Terminal, what: str) -> Iterator[None]:
    """Shows ``what`` while the block runs."""
    console = terminal.stderr_console()
    if terminal.verbosity < 0 or not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    with console.status(what):
        yield
