"""Logs: one JSON object, or one line of text, per event on stderr. Never a secret, never the content of a request."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
REPEAT_S = 30.0
_CALLS = "hetis.planner.calls"
_ABOUT = ("cluster", "node", "replica", "plan", "reason", "incident")
_MOST_HELD = 10_000


def set_up_logs(*, level: str, form: str) -> None:
    """Send everything that the process logs to stderr in the given form (``json`` or ``text``)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    handler.addFilter(CountRepeats())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("hetis").setLevel(level.upper())
    logging.getLogger("grpc").setLevel(logging.ERROR)  # it logs every call that ends with a status


class CountRepeats(logging.Filter):
    """Passes a warning once in `REPEAT_S`, with ``repeated``, the number of times it was suppressed since.

    Warnings about different subjects (``cluster``, ``reason``) are different; a count or a time makes no difference.
    Lines about calls always pass: each is about another call.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._held: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.name == _CALLS:
            return True
        error = record.exc_info[0] if record.exc_info else None
        about = tuple(str(getattr(record, name, "")) for name in _ABOUT)
        key = (record.name, record.levelno, str(record.msg), about, error)
        now_s = self._clock()
        until_s, num_held = self._held.get(key, (now_s, 0))
        if now_s < until_s:
            self._held[key] = until_s, num_held + 1
            return False
        if len(self._held) >= _MOST_HELD:
            self._held = {key: held for key, held in self._held.items() if held[0] > now_s}
        self._held[key] = now_s + REPEAT_S, 0
        if num_held:
            record.repeated = num_held
        return True


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
    """Text for people: time, level, message, ``key=value``."""

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
    text = text.replace("\r", " ").replace("\n", " | ")
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
