"""The application: verbs, help, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from hetis.commands.terminal import Terminal
from hetis.commands.verb import run_application, version_option
from hetis.profiler.cli import profiles
from hetis.profiler.cli.calibrate import CALIBRATE_EXAMPLES, calibrate
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.measurements import RUN_EXAMPLES, import_tables
from hetis.profiler.cli.measurements import run as run_verb

# Where a missing module can be obtained.
_EXTRAS = {
    "pyarrow": "'hetis[profiler]'",
    "torch": "'hetis[profiler]', or torch as pytorch.org describes for your GPU",
}

app = typer.Typer(
    name="hetis-profile",
    help="Measure GPUs or import measurements, fit profiles to them, and report the error of the fits.",
    epilog=ProfileExitCode.listed(),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run", rich_help_panel="Measurements", epilog=RUN_EXAMPLES)(run_verb)
app.command("import", rich_help_panel="Measurements")(import_tables)
app.command(rich_help_panel="Profiles", epilog=profiles.FIT_EXAMPLES)(profiles.fit)
app.command(rich_help_panel="Profiles")(profiles.model)
app.command(rich_help_panel="Profiles", epilog=CALIBRATE_EXAMPLES)(calibrate)
for look in (profiles.show, profiles.check):
    app.command(rich_help_panel="Inspect")(look)


@app.callback()
def hetis_profile(
    _version: Annotated[bool, version_option("hetis-profile")] = False,
) -> None:
    """Measure GPUs or import measurements, fit profiles to them, and report the error of the fits."""


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Every error becomes a message on stderr."""
    return run_application(app, "hetis-profile", arguments, _report_failure)


def _report_failure(error: Exception) -> int:
    """Print an error on stderr, never a traceback, and return its exit code."""
    code, message, details = _described(error)
    Terminal().error(message, details)
    return code


def _described(error: Exception) -> tuple[ProfileExitCode, str, list[str]]:
    """Return exit code, headline, and the lines below it."""
    from hetis.formats.catalogue import UnknownNameError
    from hetis.formats.errors import DocumentError, internal_error
    from hetis.profiler.calibrate.scraping import UnreachableError
    from hetis.solver.errors import HetisError, InvalidProblemError

    match error:
        case DocumentError():
            return ProfileExitCode.INVALID, error.headline, [str(problem) for problem in error.problems]
        case InvalidProblemError() | UnknownNameError():
            return ProfileExitCode.INVALID, str(error), []
        case UnreachableError():
            return ProfileExitCode.UNREACHABLE, str(error), []
        case HetisError():
            return ProfileExitCode.INTERNAL, str(error), []
        case ModuleNotFoundError() if error.name in _EXTRAS:
            return ProfileExitCode.INTERNAL, f"{error.name} is not installed: pip install {_EXTRAS[error.name]}", []
        case OSError():
            name = f"{error.filename}: " if error.filename else ""
            return ProfileExitCode.INTERNAL, f"{name}{error.strerror or error}", []
        case RuntimeError() if type(error).__module__ == "torch" and "OutOfMemory" in type(error).__name__:
            headline = "the GPU is out of memory: check whether another process uses it"
            return ProfileExitCode.INTERNAL, headline, [str(error).split(". ")[0]]
    return ProfileExitCode.INTERNAL, *internal_error(error)
