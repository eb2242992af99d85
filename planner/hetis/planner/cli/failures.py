"""Errors as messages and exit codes. Imported only once something has failed."""

from __future__ import annotations

import json
from contextlib import suppress

from hetis.formats.catalogue import UnknownNameError
from hetis.formats.command_line.terminal import Terminal, in_use
from hetis.formats.command_line.verb import internal_error
from hetis.formats.errors import DocumentError
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.export.replicas import NotExportableError
from hetis.planner.report.figures import plural
from hetis.planner.use_cases.errors import UncheckedPlanError
from hetis.planner.use_cases.versions import LIBRARIES
from hetis.solver.errors import HetisError, InfeasibleError, InvalidProblemError, NoPlanFoundError


def report_failure(error: Exception, terminal: Terminal | None = None) -> ExitCode:
    """Print what went wrong, never a traceback, and return the exit code.

    If programs read stdout, print it there, too: a document of ``kind: Error`` on one line of JSON.
    """
    terminal = terminal or in_use.get() or Terminal()
    if not terminal.prints_tables:
        code, message, details = describe(error)
        document = {"apiVersion": "hetis/v1", "kind": "Error", "exit_code": int(code), "message": message}
        document["details"] = [detail.removeprefix("- ") for detail in details]
        with suppress(OSError):  # stdout may be what failed
            terminal.write(f"{json.dumps(document, ensure_ascii=False)}\n")  # YAML, too
    return say_failure(error, terminal)


def say_failure(error: Exception, terminal: Terminal) -> ExitCode:
    """Print the message alone on stderr, for a verb that has printed a document of its own."""
    code, message, details = describe(error)
    terminal.error(message, details)
    return code


def describe(error: Exception) -> tuple[ExitCode, str, list[str]]:
    """Return the exit code, the headline and the lines below it."""
    match error:
        case DocumentError():
            count = plural(len(error.problems), "problem")
            return ExitCode.INVALID, f"{count} in the input", [str(problem) for problem in error.problems]
        case InvalidProblemError() | UnknownNameError():
            return ExitCode.INVALID, str(error), []
        case InfeasibleError():
            return ExitCode.INFEASIBLE, "no plan exists", [f"- {reason}" for reason in error.reasons]
        case NoPlanFoundError():
            return ExitCode.NO_PLAN, str(error), []
        case NotExportableError():
            return ExitCode.INFEASIBLE, "the plan cannot be exported so", [f"- {reason}" for reason in error.reasons]
        case UncheckedPlanError():
            return ExitCode.INTERNAL, str(error), list(error.violations)
        case HetisError():
            return ExitCode.INTERNAL, str(error), []
        case OSError():
            name = f"{error.filename}: " if error.filename else ""
            return ExitCode.INTERNAL, f"{name}{error.strerror or error}", []
        case ModuleNotFoundError() if error.name in LIBRARIES:
            return ExitCode.INTERNAL, f"{error.name} is not installed: pip install 'hetis[planner]'", []
    return ExitCode.INTERNAL, *internal_error(error)
