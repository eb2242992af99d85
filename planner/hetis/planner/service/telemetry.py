"""Telemetry of every call: a log line, a metric, a span."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from functools import cache

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from hetis.planner.service.metrics import ServiceMetrics
from hetis.planner.service.traces import Span, Traces
from hetis.planner.store import AuditedChange

_log = logging.getLogger("hetis.planner.calls")
_NAMING = ("name", "cluster", "replica", "plan", "profile", "parent", "cluster_id", "plan_id", "profile_id")
_QUIET = ("/grpc.", "/hetis.v1.DispatchService/")  # probes, and thousands of calls per second: debug level if OK
_OUR_FAULT = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


class CallRecord:
    """One call, from begin to end."""

    def __init__(self, method: str, peer: str, span: Span, *, is_stream: bool) -> None:
        self.method = method
        self.caller = ""
        self.request_name = ""
        self.reason = ""
        self.quota = self.role = self.request_id = ""
        self._peer = peer
        self._span = span
        self._is_stream = is_stream
        self._began = time.perf_counter()

    @property
    def trace_id(self) -> str:
        return self._span.trace_id

    def refused_change(self) -> AuditedChange:
        """Return the call as a refused change for the audit log."""
        return AuditedChange(
            caller=self.caller,
            role=self.role,
            method=self.method.rpartition("/")[2],
            resource=self.request_name,
            request_id=self.request_id[:64],
            outcome=self.reason,
        )

    def end(self, code: grpc.StatusCode, metrics: ServiceMetrics) -> None:
        seconds = time.perf_counter() - self._began
        metrics.call_ended(self.method, code.name, seconds, is_stream=self._is_stream)
        if self.quota:
            metrics.quota_exceeded(self.caller, self.quota)
        self._span.end(code.name, is_error=code in _OUR_FAULT)
        level = logging.INFO
        if code in _OUR_FAULT:
            level = logging.ERROR
        elif code is grpc.StatusCode.OK and self.method.startswith(_QUIET):
            level = logging.DEBUG
        if _log.isEnabledFor(level):
            _log.log(
                level,
                "stream ended" if self._is_stream else "call",
                extra={
                    "method": self.method,
                    "code": code.name,
                    "reason": self.reason,
                    "seconds": round(seconds, 6),
                    "caller": self.caller,
                    "peer": self._peer,
                    "request": self.request_name,
                    "trace": self.trace_id,
                },
            )


class Telemetry:
    """Starts call records."""

    def __init__(self, metrics: ServiceMetrics, traces: Traces) -> None:
        self.metrics = metrics
        self._traces = traces

    def begin(
        self, method: str, peer: str, metadata: Iterable[tuple[str, str | bytes]], *, is_stream: bool
    ) -> CallRecord:
        self.metrics.call_began(method)
        carrier: Mapping[str, str] = {
            key: value for key, value in metadata if key in ("traceparent", "tracestate") and isinstance(value, str)
        }
        return CallRecord(method, peer, self._traces.begin(method, carrier), is_stream=is_stream)


@cache
def _naming_fields(message: Descriptor) -> tuple[str, ...]:
    fields = message.fields_by_name
    return tuple(name for name in _NAMING if name in fields and not fields[name].is_repeated)


def name_of(request: Message) -> str:
    """Return the resource that a request names, at most 200 characters; empty if it names none."""
    for naming in _naming_fields(request.DESCRIPTOR):
        value = getattr(request, naming)
        if isinstance(value, str) and value:
            return value[:200]
        if isinstance(value, Message) and isinstance(found := getattr(value, "name", ""), str) and found:
            return found[:200]
    return ""
