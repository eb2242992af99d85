"""The application: verbs, help, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from hetis.formats.command_line.verb import run_application, version_printer
from hetis.profiler.cli.calibrate import CALIBRATE_EXAMPLES, calibrate
from hetis.profiler.cli.check import check
from hetis.profiler.cli.compare import compare
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.fit import FIT_EXAMPLES, fit
from hetis.profiler.cli.import_tables import import_tables
from hetis.profiler.cli.model import model
from hetis.profiler.cli.plot import plot
from hetis.profiler.cli.run import RUN_EXAMPLES
from hetis.profiler.cli.run import run as run_verb
from hetis.profiler.cli.show import show

_EPILOG = "Exit codes: " + " · ".join(f"{code.value} {code.meaning.partition(',')[0]}" for code in ProfileExitCode)

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
app.command(rich_help_panel="Profiles", epilog=CALIBRATE_EXAMPLES)(calibrate)
app.command(rich_help_panel="Look at them")(show)
app.command(rich_help_panel="Look at them")(compare)
app.command(rich_help_panel="Look at them")(plot)
app.command(rich_help_panel="Look at them")(check)


@app.callback()
def hetis_profile(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=version_printer("hetis-profile"), is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Measure what a GPU reaches, import what others measured, fit it, and say how wrong the fit is."""


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Every error becomes a message on stderr."""
    return run_application(app, "hetis-profile", arguments, _report_failure)


def _report_failure(error: Exception) -> int:
    from hetis.profiler.cli.failures import report_failure  # only after a failure

    return report_failure(error)
