"""Errors as statuses with `google.rpc` details: the only place where exceptions are converted for the wire."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, Never, cast
from urllib.parse import quote

from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hetis.formats.errors import DocumentError
from hetis.planner.failures import Reason, ServiceError, invalid_document
from hetis.solver.errors import InvalidProblemError

DOMAIN = "hetis"
Status = Any  # google.rpc has no type stubs
# gRPC drops responses whose headers exceed 8 KiB. They contain the message twice, and the details in base64.
_MOST_MESSAGE_BYTES = 1200
_MOST_DETAIL_BYTES = 3600
_RETRIED = {
    Reason.ERROR_REASON_SOLVER_QUEUE_FULL: 5.0,
    Reason.ERROR_REASON_NOT_LEADER: 1.0,
    Reason.ERROR_REASON_DRAINING: 1.0,
}
_ABOUT_A_RESOURCE = {
    Reason.ERROR_REASON_NOT_FOUND,
    Reason.ERROR_REASON_ALREADY_EXISTS,
    Reason.ERROR_REASON_RESOURCE_IN_USE,
}
_TYPES = {
    "clusters": "Cluster",
    "nodes": "Node",
    "replicas": "Replica",
    "redispatches": "Redispatch",
    "profiles": "Profile",
    "plans": "Plan",
}


def draining() -> ServiceError:
    return ServiceError(Reason.ERROR_REASON_DRAINING, "this planner is shutting down: retry")


def incident(incident_id: str) -> ServiceError:
    """Return the error that callers receive for a bug: it reveals only the id of the log entry."""
    message = f"internal error, incident {incident_id}: see the planner's log, and please report its entry"
    return ServiceError(Reason.ERROR_REASON_INTERNAL, message, metadata={"incident": incident_id})


def as_service_error(error: Exception) -> ServiceError | None:
    """Return the error for callers, or None if it was not raised on purpose and so is a bug."""
    match error:
        case ServiceError():
            return error
        case DocumentError():
            return invalid_document(error, "document")
        case InvalidProblemError():
            return ServiceError(Reason.ERROR_REASON_INVALID_PROBLEM, str(error))
    return None


def to_status(error: ServiceError) -> Status:
    """Return the status of an error with all its details. Anything too long for gRPC's headers is cut and marked."""
    code, _ = error.code.value
    status = status_pb2.Status(code=int(code), message=_shortened(str(error), _MOST_MESSAGE_BYTES))
    for detail in _details(error, status.message):
        status.details.add().Pack(detail)
    return status


async def abort(context: Any, status: Status) -> Never:
    """End a call with a status and its details. Always raises grpc.aio.AbortError."""
    found = rpc_status.to_status(status)
    if any(b"leader_address" in detail.value for detail in status.details):
        # Otherwise gRPC itself would retry here three times before the caller learns the leader's address.
        found = found._replace(trailing_metadata=(*found.trailing_metadata, ("grpc-retry-pushback-ms", "-1")))
    await context.abort_with_status(found)
    raise AssertionError("abort_with_status returned")


def _details(error: ServiceError, message: str) -> Iterable[Message]:
    metadata = {key: _shortened(value, 400) for key, value in error.metadata.items()}
    yield error_details_pb2.ErrorInfo(reason=error.reason_name, domain=DOMAIN, metadata=metadata)
    if error.reason == Reason.ERROR_REASON_INVENTORY_MISMATCH:
        yield _missing_gpus(error)
    elif error.violations:
        yield _bad_request(error)
    if error.reason == Reason.ERROR_REASON_QUOTA_EXCEEDED:
        quota: Any = error_details_pb2.QuotaFailure()
        quota.violations.add(subject=f"caller:{metadata.get('caller', '')}", description=_shortened(message, 500))
        yield quota
    retry_after_s = _RETRIED.get(error.reason) if error.retry_after_s is None else error.retry_after_s
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(retry_after_s * 1e9))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
    if error.reason in _ABOUT_A_RESOURCE:
        name = metadata.get("name", "")
        kind, owner = _resource_type(name), metadata.get("user", "")
        yield error_details_pb2.ResourceInfo(resource_type=kind, resource_name=name, owner=owner)


def _bad_request(error: ServiceError) -> Message:
    found: Any = error_details_pb2.BadRequest()
    for position, violation in enumerate(error.violations):
        field, description = _shortened(violation.field, 200), _shortened(violation.description, 500)
        found.field_violations.add(field=field, description=description)
        if found.ByteSize() > _MOST_DETAIL_BYTES:
            found.field_violations.pop()
            left = len(error.violations) - position
            found.field_violations.add(field=field, description=f"... and {left} more problems from here on")
            break
    return cast(Message, found)


def _missing_gpus(error: ServiceError) -> Message:
    failure: Any = error_details_pb2.PreconditionFailure()
    for position, missing in enumerate(error.violations):
        subject, description = missing.field[:200], _shortened(missing.description, 300)
        failure.violations.add(type="GPU_MISSING", subject=subject, description=description)
        if failure.ByteSize() > _MOST_DETAIL_BYTES:
            failure.violations.pop()
            cluster, left = error.metadata["cluster"], len(error.violations) - position
            failure.violations.add(type="GPU_MISSING", subject=cluster, description=f"... and {left} more GPUs")
            break
    return cast(Message, failure)


def _resource_type(name: str) -> str:
    """Return ``hetis.v1.Node`` for ``clusters/c/nodes/n``, according to the last collection in the name."""
    parts = name.split("/")
    collections = [part for part in parts[::2] if part in _TYPES]
    return f"hetis.v1.{_TYPES[collections[-1]]}" if collections else ""


def _shortened(text: str, most_bytes: int) -> str:
    """Cut a text to at most ``most_bytes`` bytes in a header, where everything but plain ASCII is written as %XX."""
    # Callers may send megabytes. A character takes a byte at least, so that more of them never fit.
    text = text[: most_bytes + 1].encode("utf-8", errors="replace").decode()
    if len(text) <= most_bytes // 9 or len(quote(text, safe=_PLAIN)) <= most_bytes:
        return text
    sizes = range(len(text) + 1)
    num_fitting = bisect_right(sizes, most_bytes - 3, key=lambda size: len(quote(text[:size], safe=_PLAIN)))
    return f"{text[: num_fitting - 1]}..."


_PLAIN = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) != "%")
