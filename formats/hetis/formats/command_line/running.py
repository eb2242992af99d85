"""Runs a command line in this process: every way it can end becomes an exit code, and errors become messages."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from hetis.formats.command_line.terminal import plain_streams

OK = 0
INTERRUPTED = 130  # 128 plus the number of the signal, as in shells
BROKEN_PIPE = 141
REPORT_IT = "This is a bug in hetis. HETIS_DEBUG=1 shows the traceback; please report it with the input files."


def run_application(
    application: typer.Typer,
    name: str,
    arguments: Sequence[str],
    report_failure: Callable[[Exception], int],
    *,
    defaults: Callable[[], Mapping[str, Any] | None] = lambda: None,
) -> int:
    """Run one command line and return its exit code. With ``HETIS_DEBUG=1`` an error is raised instead.

    Args:
        application: the verbs.
        name: of the command, as shown in its help.
        arguments: without the command itself.
        report_failure: prints an error and returns its exit code.
        defaults: returns defaults of options, by verb and parameter. None: only those of the options.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="replace")  # bars and dashes become question marks instead of errors
    with plain_streams():
        return _run(application, name, arguments, report_failure, defaults)


def version_printer(name: str) -> Callable[[bool], None]:
    """Return the callback of a command's ``--version``."""

    def print_version(wanted: bool) -> None:
        if wanted:
            from importlib.metadata import version

            print(f"{name} {version('hetis')}")
            raise typer.Exit

    return print_version


def _run(
    application: typer.Typer,
    name: str,
    arguments: Sequence[str],
    report_failure: Callable[[Exception], int],
    defaults: Callable[[], Mapping[str, Any] | None],
) -> int:
    try:
        code = _invoke(application, name, arguments, defaults())
        sys.stdout.flush()  # here, not at exit: a full disk or a closed pipe must reach the handlers below
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if _is_broken_pipe(error):
            return _leave_broken_pipe()
        if os.environ.get("HETIS_DEBUG") == "1":
            raise
        return report_failure(error)
    return code


def _invoke(
    application: typer.Typer, name: str, arguments: Sequence[str], defaults: Mapping[str, Any] | None
) -> int:  # fmt: skip
    try:
        application(list(arguments), prog_name=name, default_map=defaults)
    except SystemExit as stop:
        # typer swallows a broken pipe and exits 1; the pipe is still there as the context.
        if stop.__context__ is not None and _is_broken_pipe(stop.__context__):
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else OK
    return OK


def _is_broken_pipe(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def _leave_broken_pipe() -> int:
    # Python flushes stdout once more at exit and would complain: redirect it to /dev/null.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    return BROKEN_PIPE


def internal_error(error: Exception) -> tuple[str, list[str]]:
    """Return the headline, with the line of code that raised the error, and the lines below it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"internal error: {type(error).__name__}: {error}{where}", [REPORT_IT]
