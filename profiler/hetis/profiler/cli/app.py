"""The application: verbs, help, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from hetis.profiler.cli.check import check
from hetis.profiler.cli.compare import compare
from hetis.profiler.cli.exit_codes import ExitCode
from hetis.profiler.cli.fit import FIT_EXAMPLES, fit
from hetis.profiler.cli.import_tables import import_tables
from hetis.profiler.cli.model import model
from hetis.profiler.cli.plot import plot
from hetis.profiler.cli.run import RUN_EXAMPLES
from hetis.profiler.cli.run import run as run_verb
from hetis.profiler.cli.show import show

_EPILOG = "Exit codes: " + " · ".join(f"{code.value} {code.meaning.partition(',')[0]}" for code in ExitCode)

app = typer.Typer(
    name="hetis-profile",
    help="Measure what a GPU reaches, import what others measured, fit it, and say how wrong the fit is.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run", rich_help_panel="Measurements", epilog=RUN_EXAMPLES)(run_verb)
app.command("import", rich_help_panel="Measurements")(import_tables)
app.command(rich_help_panel="Profiles", epilog=FIT_EXAMPLES)(fit)
app.command(rich_help_panel="Profiles")(model)
app.command(rich_help_panel="Look at them")(show)
app.command(rich_help_panel="Look at them")(compare)
app.command(rich_help_panel="Look at them")(plot)
app.command(rich_help_panel="Look at them")(check)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as version_of

        print(f"hetis-profile {version_of('hetis')}")
        raise typer.Exit


@app.callback()
def hetis_profile(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Measure what a GPU reaches, import what others measured, fit it, and say how wrong the fit is."""


def main() -> NoReturn:
    """Runs the command line of this process and exits."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; every error has become a message on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="replace")  # dashes and bars become question marks, not errors
    try:
        code = _invoke(arguments)
        sys.stdout.flush()  # here, not at exit: a full disk or a closed pipe must reach the code below
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except Exception as error:
        if _is_broken_pipe(error):
            return _leave_broken_pipe()
        if os.environ.get("HETIS_DEBUG") == "1":
            raise
        from hetis.profiler.cli.failures import report_failure

        return report_failure(error)
    return code


def _invoke(arguments: Sequence[str]) -> int:
    try:
        app(list(arguments), prog_name="hetis-profile")
    except SystemExit as stop:
        # typer swallows a broken pipe and exits 1; the pipe is still there as the context.
        if stop.__context__ is not None and _is_broken_pipe(stop.__context__):
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else ExitCode.OK
    return ExitCode.OK


def _is_broken_pipe(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def _leave_broken_pipe() -> int:
    # Python flushes stdout once more on its way out and would complain: give it a reader.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    return ExitCode.BROKEN_PIPE
