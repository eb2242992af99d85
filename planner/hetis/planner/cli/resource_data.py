"""Resources as plain data for ``-o json`` and ``-o yaml``: the contract's field names, and documents' contents."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message


def resource_data(message: Message) -> dict[str, Any]:
    """Return a message as JSON values; as in protobuf, enums are names, times RFC 3339, and 64-bit numbers text."""
    found: dict[str, Any] = _readable(MessageToDict(message, preserving_proto_field_name=True))
    return found


def list_data(kind: str, messages: Iterable[Message]) -> dict[str, Any]:
    """Return several resources: ``items`` under a header with their kind."""
    return {"apiVersion": "hetis/v1", "kind": kind, "items": [resource_data(message) for message in messages]}


def _readable(value: Any) -> Any:
    """Return the same with the contents of documents in plain text; protobuf writes bytes as base64."""
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if not isinstance(value, dict):
        return value
    readers = {"content": _content, "text": _text}
    return {key: readers.get(key, _readable)(item) for key, item in value.items()}


def _text(value: Any) -> Any:
    try:
        return base64.b64decode(value, validate=True).decode("utf-8")
    except (TypeError, ValueError):  # a UnicodeDecodeError is one
        return value


def _content(value: Any) -> Any:
    try:
        return json.loads(_text(value))
    except (TypeError, ValueError):
        return _text(value)
