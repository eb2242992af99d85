"""Failed calls as messages: the reason, every violation, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from hetis.planner.client import CallError

_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.INVALID,
    grpc.StatusCode.NOT_FOUND: ExitCode.INVALID,
    grpc.StatusCode.UNAUTHENTICATED: ExitCode.INVALID,
    grpc.StatusCode.PERMISSION_DENIED: ExitCode.INVALID,
    grpc.StatusCode.UNAVAILABLE: ExitCode.UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: ExitCode.UNREACHABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExitCode.UNREACHABLE,
    grpc.StatusCode.ABORTED: ExitCode.CONFLICT,
    grpc.StatusCode.ALREADY_EXISTS: ExitCode.CONFLICT,
    grpc.StatusCode.FAILED_PRECONDITION: ExitCode.CONFLICT,
}
ADVICE = {
    "ACTIVATION_IN_PROGRESS": "wait for {plan}: hetis-plan watch {plan}",
    "ALREADY_EXISTS": "read what is there: hetis-plan get {name}",
    "CREDENTIALS": "say who you are: --token-file, or --cert and --key",
    "DRAINING": "the planner shuts down: repeat in a moment",
    "ETAG_MISMATCH": "see what changed (hetis-plan get {name}), then repeat if it is still what you want",
    "INVENTORY_MISMATCH": "see what agents found: hetis-plan agents --cluster {cluster}",
    "NOT_LEADER": "another planner leads: repeat, or name it with --server",
    "NO_EARLIER_PLAN": "activate another plan: hetis-plan get plans, hetis-plan apply --activate PLAN",
    "PLAN_CHECK_FAILED": "see every broken rule: hetis-plan check FILE",
    "PLAN_STATE": "see its state: hetis-plan get {name}",
    "STORE_UNAVAILABLE": "the planner's disk or database is in trouble: repeat when it is mended",
    "RESOURCE_IN_USE": "end what uses it first: {user}",
    "ROLE": "the call needs role {needed}, these credentials have role {role}",
}


def report_call_failure(terminal: Terminal, error: CallError, address: str, *, is_plain: bool = False) -> ExitCode:
    """Print a failed call on stderr and return its exit code. ``is_plain``: the call was made without TLS."""
    message = str(error)
    if not error.reason and error.is_unreachable:
        timed_out = error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        message = f"the planner at {address} {'did not answer in time' if timed_out else 'is not reached'}: {message}"
    violations = [f"{violation.field}: {violation.description}" for violation in error.violations]
    if violations:  # the message only repeats them
        message = f"{len(violations)} problem{'s' if len(violations) > 1 else ''} in the request"
    reason = f" ({error.reason})" if error.reason else f" ({error.code.name})"
    terminal.error(f"{message}{reason}", violations)
    advice = _advice(error, is_plain=is_plain)
    if advice:
        terminal.line(f"  {advice}")
    return _CODES.get(error.code, ExitCode.INTERNAL)


def _advice(error: CallError, *, is_plain: bool) -> str:
    if error.retry_after_s is not None:
        return f"repeat in {error.retry_after_s:g} s"
    if error.reason == "NOT_FOUND":
        collection = error.metadata.get("name", "").rpartition("/")[0].rpartition("/")[2]
        return f"see what there is: hetis-plan get {collection}" if collection else ""
    if not error.reason and error.is_unreachable:
        return _how_to_reach(str(error), is_plain=is_plain)
    try:
        return ADVICE.get(error.reason, "").format_map(error.metadata)
    except KeyError:  # a planner that sends less than the contract requires
        return ""


# What gRPC reports when both sides talk, but only one of them uses TLS, or they trust different authorities.
_BROKEN_OFF = ("socket closed", "connection reset", "broken pipe", "end of tcp stream", "goaway", "preface")
_TLS = ("ssl", "tls", "handshak", "certificate", "security")


def _how_to_reach(message: str, *, is_plain: bool) -> str:
    said = message.lower()
    if is_plain and any(sign in said for sign in _BROKEN_OFF):
        return "somebody listens there, and may want TLS: --ca FILE says the authority of the planner's certificate"
    if is_plain:
        return "is hetis-planner running? --server or HETIS_SERVER says where; --ca if it has a certificate of its own"
    tls = (
        "does --ca name the authority of the planner's certificate, is the certificate of this host name and not"
        " expired, does the planner have TLS at all, and does it want --cert and --key?"
    )
    if any(sign in said for sign in (*_TLS, *_BROKEN_OFF)):
        return f"TLS fails: {tls}"
    # For a host with several addresses gRPC reports only the last failure, perhaps of one where nobody listens.
    return f"is hetis-planner running? --server or HETIS_SERVER says where. If it is: {tls}"
