"""Telemetry: log lines, and the record of every call."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.message import Message

from hetis.planner.callers import Identity
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.resources.committing import named_in
from hetis.planner.service.observability.metrics import ServiceMetrics
from hetis.planner.store import AuditedChange

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
REPEAT_S = 30.0
_CALLS = "hetis.planner.calls"
_ABOUT = ("cluster", "node", "replica", "plan", "host", "reason", "incident")
_MOST_HELD = 10_000


def set_up_logs(*, level: str, form: str) -> None:
    """Write everything that the process logs to stderr in a form (``json`` or ``text``)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    handler.addFilter(CountRepeats())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("hetis").setLevel(level.upper())
    logging.getLogger("grpc").setLevel(logging.ERROR)  # otherwise it logs every call that ends with an error status


class CountRepeats(logging.Filter):
    """Passes a warning once per `REPEAT_S`, with ``repeated``, the number of times that it was suppressed before.

    Warnings about different subjects (``cluster``, ``reason``) count as different; a count or a time makes no
    difference. Lines about calls always pass, since each is about another call, except those of callers without valid
    credentials: anyone who reaches the port could fill the disk. They are limited alike, per host.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._held: dict[tuple[object, ...], tuple[float, int]] = {}
        self._full_until_s = -math.inf  # when there may be room for another subject if there is none now

    def filter(self, record: logging.LogRecord) -> bool:
        key = _subject(record)
        if key is None:
            return True
        now_s = self._clock()
        if key not in self._held and len(self._held) >= _MOST_HELD:
            if now_s >= self._full_until_s:
                self._held = {key: held for key, held in self._held.items() if held[0] > now_s}
                self._full_until_s = min((until_s for until_s, _ in self._held.values()), default=now_s)
            if len(self._held) >= _MOST_HELD:
                key = (record.name,)  # one subject for all that are too many
        until_s, num_held = self._held.get(key, (now_s, 0))
        if now_s < until_s:
            self._held[key] = until_s, num_held + 1
            return False
        self._held[key] = now_s + REPEAT_S, 0
        if num_held:
            record.repeated = num_held
        return True


def _subject(record: logging.LogRecord) -> tuple[object, ...] | None:
    """Return what tells a line from others that are not its repetitions; None: it always passes."""
    if record.name == _CALLS:
        is_strangers = getattr(record, "reason", "") == "CREDENTIALS" and not getattr(record, "caller", "")
        return (record.name, str(getattr(record, "peer", "")).rpartition(":")[0]) if is_strangers else None
    if record.levelno < logging.WARNING:
        return None
    error = record.exc_info[0] if record.exc_info else None
    about = tuple(str(getattr(record, name, "")) for name in _ABOUT)
    return record.name, record.levelno, str(record.msg), about, error


class JsonLines(logging.Formatter):
    """``{"time": ..., "level": ..., "logger": ..., "message": ...}`` and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        event |= _fields(record)
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return _UNSEEN.sub(_escaped, json.dumps(event, ensure_ascii=False, default=str))


class TextLines(logging.Formatter):
    """Human-readable text: time, level, message, and the fields as ``key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {key}={_one_word(value)}" for key, value in _fields(record).items())
        # On one line, whatever a caller put into a name.
        text = f"{moment} {record.levelname.lower():7} {_one_line(record.getMessage())}{fields}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD and value not in (None, "")}


def _one_word(value: object) -> str:
    text = f"{value:.6f}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


# Characters that JSON keeps but terminals obey or hide: C1 controls, text directions, line breaks, zero width.
_UNSEEN = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _one_line(text: str) -> str:
    return _printable(text.replace("\r", " ").replace("\n", " | "))


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


_log = logging.getLogger("hetis.planner.calls")
_NAMING = ("name", "cluster", "replica", "plan", "profile", "parent")
_IDS = {"cluster_id": "clusters", "plan_id": "plans", "profile_id": "profiles"}  # by field with a new resource's id
_QUIET = "/grpc."  # probes: level debug if OK
_OUR_FAULT = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


class CallRecord:
    """The record of one call, from its start to its end."""

    def __init__(self, method: str, peer: str, *, is_stream: bool) -> None:
        self.method = method
        self.caller = self.reason = ""
        self._role = self._request_name = self._request_id = ""
        self._quota = ""  # the quota that was used up
        self._peer = peer
        self.is_stream = is_stream
        self._began = time.perf_counter()

    @property
    def resource(self) -> str:
        """The name in the request, of which nothing is checked, in printable characters."""
        return _printable(self._request_name)

    def comes_from(self, identity: Identity) -> None:
        self.caller, self._role = identity.name, identity.role

    def requests(self, request: Message) -> None:
        """Record the name of the resource in a request, and the request's id."""
        self._request_name = (named_in(request, *_NAMING) or _name_of_new(request))[:200]
        self._request_id = getattr(request, "request_id", "")

    def failed(self, error: ServiceError) -> None:
        self.reason = error.reason_name
        self._request_name = self._request_name or error.metadata.get("node", "")[:200]  # a Hello names its node
        if error.reason == Reason.ERROR_REASON_QUOTA_EXCEEDED:
            self._quota = error.metadata["quota"]

    def refused_change(self) -> AuditedChange:
        """Return the call as a refused change for the audit log.

        The caller's text is unchecked: PostgreSQL would refuse a NUL in it, and a terminal that shows the log would
        obey other control characters.
        """
        return AuditedChange(
            caller=self.caller,
            role=self._role,
            method=self.method.rpartition("/")[2],
            resource=self.resource,
            request_id=_printable(self._request_id[:64]),
            outcome=self.reason,
        )

    def end(self, code: grpc.StatusCode, metrics: ServiceMetrics) -> None:
        seconds = time.perf_counter() - self._began
        metrics.call_ended(self.method, code.name, seconds, is_stream=self.is_stream)
        if self.reason:
            metrics.call_failed(self.reason)
        if self._quota:
            metrics.quota_exceeded(self.caller, self._quota)
        level = logging.INFO
        if code in _OUR_FAULT:
            level = logging.ERROR
        elif code is grpc.StatusCode.OK and self.method.startswith(_QUIET):
            level = logging.DEBUG
        if _log.isEnabledFor(level):
            _log.log(
                level,
                "stream ended" if self.is_stream else "call",
                extra={
                    "method": self.method,
                    "code": code.name,
                    "reason": self.reason,
                    "seconds": round(seconds, 6),
                    "caller": self.caller,
                    "peer": self._peer,
                    "request": self._request_name,
                },
            )


def _name_of_new(request: Message) -> str:
    """Return the name of the resource to be created by a request, or "" if the planner may choose it."""
    for field, collection in _IDS.items():
        if new_id := getattr(request, field, ""):
            return f"{collection}/{new_id}"
    return ""


class Telemetry:
    """Creates call records."""

    def __init__(self, metrics: ServiceMetrics) -> None:
        self.metrics = metrics

    def begin(self, method: str, peer: str, *, is_stream: bool) -> CallRecord:
        self.metrics.call_began(method)
        return CallRecord(method, peer, is_stream=is_stream)
