"""Failures of calls to the planning service, with a stable reason, a status code, and values for programs.

HetisError (hetis.solver.errors)
+-- ServiceError   raised by resources, jobs and fleet; the service turns it into a status with details
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import grpc

from hetis.formats.errors import DocumentError
from hetis.planner.callers import Identity
from hetis.solver.errors import HetisError
from hetis.v1 import failure_pb2
from hetis.v1.statuses import CODE_OF_REASON, REASON_PREFIX

Reason = failure_pb2.ErrorReason


class ServiceError(HetisError):
    """A failed call, with a reason that programs can act on.

    Attributes:
        reason: the stable cause.
        metadata: values by the keys that ``failure.proto`` lists for the reason.
        violations: all invalid fields.
        retry_after_s: how long to wait before a retry; None: unspecified.
    """

    def __init__(
        self,
        reason: Reason.ValueType,
        message: str,
        *,
        metadata: Mapping[str, object] | None = None,
        violations: Iterable[failure_pb2.FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s

    @property
    def code(self) -> grpc.StatusCode:
        """The status code of the reason; UNKNOWN if only newer planners know the reason."""
        return CODE_OF_REASON.get(self.reason, grpc.StatusCode.UNKNOWN)

    @property
    def reason_name(self) -> str:
        """Return the name of the reason as in ``ErrorInfo.reason``, without its prefix."""
        return Reason.Name(self.reason).removeprefix(REASON_PREFIX)

    def to_proto(self) -> failure_pb2.Failure:
        """Return the failure as a message, to be embedded in others."""
        return failure_pb2.Failure(
            reason=self.reason, message=str(self), field_violations=self.violations, metadata=self.metadata
        )


def not_found(name: str) -> ServiceError:
    return ServiceError(Reason.ERROR_REASON_NOT_FOUND, f"{name} does not exist", metadata={"name": name})


def etag_mismatch(name: str, *, given: str, present: str) -> ServiceError:
    return ServiceError(
        Reason.ERROR_REASON_ETAG_MISMATCH,
        f"{name} has changed: its etag is {present}, the call has {given}; read it again and retry if the "
        "change still applies",
        metadata={"name": name, "etag": present},
    )


def quota_exceeded(caller: str, quota: str, message: str, *, limit: float, retry_after_s: float) -> ServiceError:
    """Return the error for a caller that has used up its quota."""
    return ServiceError(
        Reason.ERROR_REASON_QUOTA_EXCEEDED,
        message,
        metadata={"caller": caller, "quota": quota, "limit": f"{limit:g}"},
        retry_after_s=retry_after_s,
    )


_LONGEST = 255  # characters of a name that a caller chose, in a message


def wrong_node(caller: Identity, node: str) -> ServiceError:
    """Return the error for a caller that may not act as the agent of a node, whose name may be anything."""
    node = node[:_LONGEST]
    message = f"the credentials {caller.name} are of {caller.scope or 'no node'}, not of {node}"
    return ServiceError(Reason.ERROR_REASON_WRONG_NODE, message, metadata={"node": node})


def invalid_fields(violations: Iterable[failure_pb2.FieldViolation]) -> ServiceError:
    """Return one error that lists all invalid fields of a request."""
    found = tuple(violations)
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in found)
    return ServiceError(Reason.ERROR_REASON_INVALID_FIELD, message, violations=found)


def invalid_field(field: str, description: str) -> ServiceError:
    return invalid_fields([failure_pb2.FieldViolation(field=field, description=description)])


def invalid_document(error: DocumentError, field: str) -> ServiceError:
    """Return the error for an invalid document in a request; ``field`` is the document's path within the request."""
    violations = [
        failure_pb2.FieldViolation(
            field=f"{field}#{problem.path}" if problem.path else field, description=str(problem), line=problem.line or 0
        )
        for problem in error.problems
    ]
    return ServiceError(Reason.ERROR_REASON_INVALID_DOCUMENT, str(error), violations=violations)
