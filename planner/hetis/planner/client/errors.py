"""Errors of calls, with the API's details.

HetisError (hetis.solver.errors)
+-- CallError   the planner refused a call, could not do it, or could not be reached
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from hetis.solver.errors import HetisError
from hetis.v1.failure_pb2 import FieldViolation

_DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "hetis"


class CallError(HetisError):
    """A call failed. Act on ``reason``, never on the message.

    Attributes:
        reason: an ErrorReason without its prefix, such as ``ETAG_MISMATCH``; empty if gRPC itself raised it.
        metadata: the keys that ``failure.proto`` lists for the reason.
        violations: every wrong field of the request, and every missing GPU: its ``field`` is a path, followed after
            ``#`` by a path inside a document, and has a ``description``.
        retry_after_s: when to try again; None if unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Iterable[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s

    @property
    def is_unreachable(self) -> bool:
        """Return whether no answer arrived, in time or at all; the call may have been executed."""
        return self.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def call_error(error: grpc.RpcError) -> CallError:
    """Return the error with its details; unreadable details are omitted."""
    found = error.code() if hasattr(error, "code") else None
    code = found if isinstance(found, grpc.StatusCode) else grpc.StatusCode.UNKNOWN
    message = str((error.details() if hasattr(error, "details") else None) or error)
    reason, metadata, retry_after_s = "", dict[str, str](), None
    violations: list[FieldViolation] = []
    for detail in _details(error):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            if info.domain == DOMAIN:
                reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            wrong = error_details_pb2.BadRequest.FromString(detail.value)
            violations += [FieldViolation(field=v.field, description=v.description) for v in wrong.field_violations]
        elif detail.Is(error_details_pb2.PreconditionFailure.DESCRIPTOR):
            missing = error_details_pb2.PreconditionFailure.FromString(detail.value)
            violations += [FieldViolation(field=v.subject, description=v.description) for v in missing.violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry_after_s = delay.seconds + delay.nanos / 1e9
    return CallError(
        message, code=code, reason=reason, metadata=metadata, violations=violations, retry_after_s=retry_after_s
    )


def _details(error: grpc.RpcError) -> list[Any]:
    trailers: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    binary = {key: value for key, value in trailers or () if isinstance(value, bytes)}
    try:
        return list(status_pb2.Status.FromString(binary[_DETAILS_KEY]).details)
    except (KeyError, DecodeError):
        return []


FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
REPORTED_AFTER_S = 3.0  # a restart of the planner is usually over by then
REPORTED_AGAIN_S = 60.0
STANDS_AFTER_S = 1.0  # a stream that breaks sooner than this after it was opened counts as a failed attempt


@dataclass(slots=True, kw_only=True)
class Retries:
    """The limit on retries of a watch that gets no answer.

    Attributes:
        limit_s: limit on the total time of attempts and waits without an answer; the watch ends with the error
            rather than wait beyond it. 0: the first error ends it.
        report: called with False when there has been no answer for `REPORTED_AFTER_S`, again every `REPORTED_AGAIN_S`,
            and with True once there is an answer again.
        jitter: returns a number from 0 to 1, so that many clients do not return at once.
        clock: monotonic seconds.
    """

    limit_s: float = 60.0
    report: Callable[[bool], object] = lambda is_reached: None
    jitter: Callable[[], float] = field(default=random.random)
    clock: Callable[[], float] = field(default=time.monotonic)
    _began_s: float | None = field(default=None, init=False)  # start of the attempt that has had no answer yet
    _opened_s: float | None = field(default=None, init=False)  # when the planner opened its stream
    _silent_s: float = field(default=0.0, init=False)
    _attempts: int = field(default=0, init=False)
    _reported_s: float | None = field(default=None, init=False)  # `_silent_s` at the last `report(False)`

    def attempt(self) -> None:
        """Record the start of an attempt."""
        self._began_s, self._opened_s = self.clock(), None

    def opened(self) -> None:
        """Record that the planner has opened the stream: a stream that stays open from now on merely has no changes."""
        self._opened_s = self.clock()
        self._report_reached()

    def answered(self) -> None:
        """Record an answer: a later failure starts a new series of retries."""
        self._began_s, self._silent_s, self._attempts = None, 0.0, 0
        self._report_reached()

    def next_wait_s(self, error: CallError | None, *, has_newer_credentials: bool = False) -> float:
        """Return how long to wait before the next attempt.

        Args:
            error: the error that ended the stream; None if it ended with OK although there is more to come.
            has_newer_credentials: whether the caller has other credentials by now than those of the stream.

        Raises:
            CallError: the error itself, if waiting does not help or would last too long.
        """
        may_pass = (grpc.StatusCode.UNAVAILABLE, *([grpc.StatusCode.UNAUTHENTICATED] if has_newer_credentials else []))
        if error is not None and error.code not in may_pass:
            raise error
        if self._opened_s is not None and self.clock() - self._opened_s >= STANDS_AFTER_S:
            self.answered()
        took_s = 0.0 if self._began_s is None else self.clock() - self._began_s
        self._silent_s += took_s
        longest = min(FIRST_WAIT_S * 2.0 ** min(self._attempts, 30), LONGEST_WAIT_S)  # without `min` it could overflow
        requested_s = (error.retry_after_s or 0.0) if error is not None else 0.0
        wait_s = max(longest * self.jitter(), requested_s)
        self._attempts += 1
        self._silent_s += max(wait_s, FIRST_WAIT_S / 10)  # jitter near 0 must not make the retries endless
        if error is not None and self._silent_s + took_s > self.limit_s:  # the next attempt takes as long, too
            raise error
        reports_from_s = REPORTED_AFTER_S if self._reported_s is None else self._reported_s + REPORTED_AGAIN_S
        if error is not None and self._silent_s >= reports_from_s:
            self._reported_s = self._silent_s
            self.report(False)
        return wait_s

    def _report_reached(self) -> None:
        if self._reported_s is not None:
            self._reported_s = None
            self.report(True)
