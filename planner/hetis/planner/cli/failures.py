"""Conversion of errors into messages and exit codes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hetis.commands.terminal import OutputFormat, Terminal, in_use
from hetis.formats.errors import DocumentError, internal_error
from hetis.planner.cli.exit_codes import ExitCode
from hetis.solver.errors import HetisError, InfeasibleError, InvalidProblemError, NoPlanFoundError, UncheckedPlanError

if TYPE_CHECKING:
    from hetis.planner.client import CallError


def report_failure(error: Exception, terminal: Terminal | None = None) -> ExitCode:
    """Print what went wrong, never a traceback, and return the exit code.

    If stdout is read by a program, also print the error there: a document of ``kind: Error`` on one line of JSON.
    """
    terminal = terminal or in_use.get() or Terminal()
    return refuse(terminal, *describe(error))


def report_no_plan(error: NoPlanFoundError, terminal: Terminal, *, interrupted: bool) -> ExitCode:
    """Print that no plan was found, or that the search was ``interrupted`` before one was, and return the exit code."""
    if interrupted:
        return refuse(terminal, ExitCode.INTERRUPTED, "stopped before a plan was found")
    return report_failure(error, terminal)


def say_failure(error: Exception, terminal: Terminal) -> ExitCode:
    """Print only the message, on stderr, for a verb that has printed a document of its own."""
    code, message, details = describe(error)
    terminal.error(message, details)
    return code


def refuse(
    terminal: Terminal, code: ExitCode, message: str, details: Sequence[str] = (), *, reason: str = ""
) -> ExitCode:
    """Print an error on stderr, and on stdout if that is read by a program, and return the exit code.

    ``reason``: what programs act on if a planner refused a call; it follows the message in parentheses.
    """
    if not terminal.prints_tables:
        document: dict[str, Any] = {"apiVersion": "hetis/v1", "kind": "Error", "exit_code": int(code)}
        document |= {"reason": reason} if reason else {}
        document |= {"message": message, "details": [detail.removeprefix("- ") for detail in details]}
        # One line of JSON is valid YAML, too, in a document of its own if others have been printed.
        begin = "---\n" if terminal.output is OutputFormat.YAML else ""
        with suppress(OSError):  # writing to stdout may be what failed
            terminal.write(f"{begin}{json.dumps(document, ensure_ascii=False)}\n")
    terminal.error(f"{message} ({reason})" if reason else message, details)
    return code


def describe(error: Exception) -> tuple[ExitCode, str, list[str]]:
    """Return the exit code, the headline and the lines to print below it."""
    from hetis.formats.catalogue import UnknownNameError
    from hetis.planner.export.replicas import NotExportableError
    from hetis.planner.use_cases.record.versions import LIBRARIES

    match error:
        case DocumentError():
            return ExitCode.INVALID, error.headline, [str(problem) for problem in error.problems]
        case InvalidProblemError() | UnknownNameError():
            return ExitCode.INVALID, str(error), []
        case InfeasibleError():
            return ExitCode.INFEASIBLE, "no plan exists", [f"- {reason}" for reason in error.reasons]
        case NoPlanFoundError():
            return ExitCode.NO_PLAN, str(error), []
        case NotExportableError():
            return (
                ExitCode.INFEASIBLE,
                "the plan cannot be exported with these options",
                [f"- {reason}" for reason in error.reasons],
            )
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


_CODES = {  # by the name of the gRPC status
    "INVALID_ARGUMENT": ExitCode.INVALID,
    "NOT_FOUND": ExitCode.INVALID,
    "UNAUTHENTICATED": ExitCode.INVALID,
    "PERMISSION_DENIED": ExitCode.INVALID,
    "UNAVAILABLE": ExitCode.UNREACHABLE,
    "DEADLINE_EXCEEDED": ExitCode.UNREACHABLE,
    "RESOURCE_EXHAUSTED": ExitCode.UNREACHABLE,
    "ABORTED": ExitCode.CONFLICT,
    "ALREADY_EXISTS": ExitCode.CONFLICT,
    "FAILED_PRECONDITION": ExitCode.CONFLICT,
}
_OPTIONS = {"plan_id": "--name"}  # by the field of a request that holds the option's value as it is
ADVICE = {
    "ACTIVATION_IN_PROGRESS": "wait: hetis-plan watch {plan}; if none of it serves: hetis-plan cancel {plan}",
    "ALREADY_EXISTS": "read the existing one: hetis-plan get {name}",
    "CREDENTIALS": "give credentials: --token-file, or --cert and --key",
    "DRAINING": "the planner is shutting down: retry in a moment",
    "ETAG_MISMATCH": "see what changed (hetis-plan get {name}), then retry if you still want this",
    "INVENTORY_MISMATCH": "see what the agents found: hetis-plan agents --cluster {cluster}",
    "NOT_LEADER": "retry in a moment, or name the leader with --server",
    "NO_EARLIER_PLAN": "activate another plan: hetis-plan apply --activate PLAN; if none of {plan} serves, first"
    " hetis-plan cancel {plan}",
    "PLAN_CHECK_FAILED": "list every violated rule: hetis-plan check FILE",
    "PLAN_STATE": "see its state: hetis-plan get {name}",
    "STORE_UNAVAILABLE": "the planner's disk or database is failing: retry once it is repaired",
    "RESOURCE_IN_USE": "wait until it has stopped: hetis-plan get {user}",
    "ROLE": "the call needs role {needed}, these credentials have role {role}",
}


def report_call_failure(terminal: Terminal, error: CallError, address: str = "", *, is_plain: bool = False) -> ExitCode:
    """Print a failed call as `refuse` does and return its exit code.

    ``address`` and ``is_plain``, for a call made without TLS, are for planners that cannot be reached.
    """
    message = str(error)
    if not error.reason and error.is_unreachable:
        timed_out = error.code.name == "DEADLINE_EXCEEDED"
        message = f"the planner at {address} {'did not answer in time' if timed_out else 'is unreachable'}: {message}"
    violations = [f"{_OPTIONS.get(one.field, one.field)}: {one.description}" for one in error.violations]
    if violations:  # the message only repeats them
        message = f"{len(violations)} problem{'s' if len(violations) > 1 else ''} in the request"
    advice = _advice(error, is_plain=is_plain)
    details = [*violations, advice] if advice else violations
    code = _CODES.get(error.code.name, ExitCode.INTERNAL)
    return refuse(terminal, code, message, details, reason=error.reason or error.code.name)


def _advice(error: CallError, *, is_plain: bool) -> str:
    if error.retry_after_s is not None:
        return f"retry in {error.retry_after_s:g} s"
    if error.reason == "NOT_FOUND":
        collection = error.metadata.get("name", "").rpartition("/")[0].rpartition("/")[2]
        return f"list what exists: hetis-plan get {collection}" if collection else ""
    if not error.reason and error.is_unreachable:
        return _how_to_reach(str(error), is_plain=is_plain)
    if error.reason == "RESOURCE_IN_USE" and (advice := _how_to_free(error.metadata)):
        return advice
    try:
        return ADVICE.get(error.reason, "").format_map(error.metadata)
    except KeyError:  # the planner sends less metadata than the contract requires
        return ""


def _how_to_free(metadata: Mapping[str, str]) -> str:
    """Return how to end the use of a plan or a cluster by a plan in force, an empty string for other users."""
    name, user = metadata.get("name", ""), metadata.get("user", "")
    if name.startswith("plans/"):
        otherwise = f"if nothing serves: hetis-plan cancel {name}"
        return f"activate another plan first: hetis-plan apply --activate PLAN; {otherwise}"
    if user.startswith("plans/"):
        return f"once nothing serves, take its plan out of force: hetis-plan cancel {user}"
    return ""


# What gRPC reports if something answers, but only one side uses TLS, or the sides trust different authorities.
_BROKEN_OFF = ("socket closed", "connection reset", "broken pipe", "end of tcp stream", "goaway", "preface")
_TLS = ("ssl", "tls", "handshak", "certificate", "security")


def _how_to_reach(message: str, *, is_plain: bool) -> str:
    said = message.lower()
    if is_plain and any(sign in said for sign in _BROKEN_OFF):
        return "a process listens there and may require TLS: --ca FILE gives the CA of the planner's certificate"
    if is_plain:
        return (
            "is hetis-planner running? Give its address with --server or HETIS_SERVER, and --ca if its "
            "certificate is from a private CA"
        )
    tls = (
        "check that --ca is the CA of the planner's certificate, that the certificate is for this host name and has"
        " not expired, that the planner uses TLS at all, and whether it requires --cert and --key"
    )
    if any(sign in said for sign in (*_TLS, *_BROKEN_OFF)):
        return f"TLS failed: {tls}"
    # For a host with several addresses gRPC reports only the last failure, perhaps of one on which nothing listens.
    return f"is hetis-planner running? Give its address with --server or HETIS_SERVER. If it is running: {tls}"
