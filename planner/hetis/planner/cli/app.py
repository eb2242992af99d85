"""The application: verbs, help, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from hetis.planner.cli.agents import agents
from hetis.planner.cli.apply import APPLY_EXAMPLES, apply
from hetis.planner.cli.cancel import cancel
from hetis.planner.cli.catalog import catalog
from hetis.planner.cli.check import check
from hetis.planner.cli.compare import compare
from hetis.planner.cli.completion import completion
from hetis.planner.cli.dispatch import dispatch
from hetis.planner.cli.doctor import doctor
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.explain import explain
from hetis.planner.cli.get import get
from hetis.planner.cli.init import init
from hetis.planner.cli.place import place
from hetis.planner.cli.redispatch import redispatch
from hetis.planner.cli.rollback import rollback
from hetis.planner.cli.schema import schema
from hetis.planner.cli.stage_options import DISPATCH_EXAMPLES, REDISPATCH_EXAMPLES
from hetis.planner.cli.status import status
from hetis.planner.cli.validate import validate
from hetis.planner.cli.version import version
from hetis.planner.cli.watch import watch

_EPILOG = "Exit codes: " + " · ".join(f"{code.value} {code.meaning.partition(',')[0]}" for code in ExitCode)

app = typer.Typer(
    name="hetis-plan",
    help="Plan LLM serving on a mixed GPU fleet, with a proof of how good the plan is.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,  # the verb `completion` prints the script; nothing edits the user's shell files
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(rich_help_panel="Plan")(place)
app.command(rich_help_panel="Plan")(compare)
app.command(rich_help_panel="Plan")(explain)
app.command(rich_help_panel="Plan")(check)
app.command(rich_help_panel="One stage, while it serves", epilog=DISPATCH_EXAMPLES)(dispatch)
app.command(rich_help_panel="One stage, while it serves", epilog=REDISPATCH_EXAMPLES)(redispatch)
app.command(rich_help_panel="With a planner", epilog=APPLY_EXAMPLES)(apply)
app.command(rich_help_panel="With a planner")(get)
app.command(rich_help_panel="With a planner")(watch)
app.command(rich_help_panel="With a planner")(agents)
app.command(rich_help_panel="With a planner")(status)
app.command(rich_help_panel="With a planner")(rollback)
app.command(rich_help_panel="With a planner")(cancel)
app.command(rich_help_panel="Files")(init)
app.command(rich_help_panel="Files")(validate)
app.command(rich_help_panel="Files")(schema)
app.command(rich_help_panel="Files")(catalog)
app.command(rich_help_panel="This installation")(doctor)
app.command(rich_help_panel="This installation")(completion)
app.command(rich_help_panel="This installation")(version)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as version_of

        print(f"hetis-plan {version_of('hetis')}")
        raise typer.Exit


@app.callback()
def hetis_plan(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Plan LLM serving on a mixed GPU fleet, with a proof of how good the plan is."""


def main() -> NoReturn:
    """Entry point of the ``hetis-plan`` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; every error has become a message on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="replace")  # bars and dashes become question marks, not errors
    if "_HETIS_PLAN_COMPLETE" in os.environ:  # the script that `completion` printed asks for words
        from typer.completion import completion_init  # type: ignore[attr-defined]  # imported there, not exported

        completion_init()
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
        from hetis.planner.cli.failures import report_failure

        return report_failure(error)
    return code


def _invoke(arguments: Sequence[str]) -> int:
    try:
        app(list(arguments), prog_name="hetis-plan")
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
