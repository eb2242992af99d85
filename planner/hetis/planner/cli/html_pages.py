"""HTML pages saved by verbs."""

from __future__ import annotations

from pathlib import Path

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.errors import DocumentError
from hetis.formats.files import write_atomically
from hetis.planner.cli.plan_files import STDOUT, refuse_missing_library, refuse_unwritable


def refuse_page(path: Path | None, *, beside: Path | None = None) -> None:
    """Refuse before the work a page that could not be saved; None: no page was requested.

    Args:
        beside: where the verb saves something else; its table goes to standard output in any case.

    Raises:
        DocumentError: the page cannot be written there.
        BadParameter: the library that makes pages is not installed, or something else is written there, too.
    """
    if path is None:
        return
    if path == STDOUT:
        raise typer.BadParameter("--html needs a file: `hetis-plan report PLAN --out -` prints a page")
    if path == beside:
        raise typer.BadParameter(f"--html and --out cannot both be {path}")
    refuse_unwritable_page(path)


def refuse_unwritable_page(path: Path) -> None:
    """Refuse the same for a verb that prints nothing else.

    Raises:
        DocumentError: the page cannot be written there.
        BadParameter: the library that makes pages is not installed.
    """
    refuse_unwritable(path)
    refuse_missing_library("jinja2", extra="planner", wanted_by="a page")


def save_page(terminal: Terminal, page: str, path: Path) -> None:
    """Write the page, on standard output for ``-``.

    Raises:
        DocumentError: the file cannot be written.
    """
    if path == STDOUT:
        terminal.write(page)
        return
    write_atomically(path, page)
    terminal.say(f"saved {path} ({len(page.encode()) / 1000:,.0f} kB)")


def save_page_or_tell(terminal: Terminal, page: str, path: Path) -> bool:
    """Save the page before the verb prints its answer; return False after a failure, which was reported."""
    try:
        save_page(terminal, page, path)
    except DocumentError as error:
        terminal.error("the page was not saved", [str(problem) for problem in error.problems])
        return False
    return True
