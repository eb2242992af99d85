"""Errors as messages with exit codes. Imported only after a failure."""

from __future__ import annotations

from hetis.formats.catalogue import UnknownNameError
from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import internal_error
from hetis.formats.errors import DocumentError
from hetis.profiler.calibrate.scraping import UnreachableError
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.solver.errors import HetisError, InvalidProblemError

# Where a missing module can be obtained.
_EXTRAS = {
    "torch": "'hetis[profiler]', or torch as its site says for your GPU",
    "pyarrow": "'hetis[profiler]'",
    "plotly": "'hetis[profiler]'",
    "matplotlib": "'hetis[profiler]'",
}


def report_failure(error: Exception) -> ProfileExitCode:
    """Print an error on stderr, never a traceback, and return its exit code."""
    code, message, details = describe(error)
    Terminal().error(message, details)
    return code


def describe(error: Exception) -> tuple[ProfileExitCode, str, list[str]]:
    """Return exit code, headline, and the lines below it."""
    match error:
        case DocumentError():
            count = len(error.problems)
            headline = f"{count} problem{'' if count == 1 else 's'} in the input"
            return ProfileExitCode.INVALID, headline, [str(problem) for problem in error.problems]
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
            return (
                ProfileExitCode.INTERNAL,
                "the GPU is out of memory: is somebody else using it?",
                [str(error).split(". ")[0]],
            )
    return ProfileExitCode.INTERNAL, *internal_error(error)
