"""Dataclasses as JSON values, field by field, and the documents that commands print."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Set
from enum import Enum
from typing import Any

from hetis.formats.fields import API_VERSION


def json_value(value: Any) -> Any:
    """Return a value for ``json.dumps``: mappings, lists, text, numbers; infinite numbers become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: json_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): json_value(entry) for key, entry in value.items()}
    if isinstance(value, Set):
        return sorted(json_value(entry) for entry in value)
    if isinstance(value, list | tuple):
        return [json_value(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def fields_of(value: object, *names: str) -> dict[str, Any]:
    """Return the named fields and properties of a value."""
    return {name: getattr(value, name) for name in names}


def document(kind: str, **fields: Any) -> dict[str, Any]:
    """Return a document of this kind as JSON values."""
    envelope = {"apiVersion": API_VERSION, "kind": kind}
    return envelope | {name: json_value(value) for name, value in fields.items()}
