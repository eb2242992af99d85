"""Enum values as people read them: ``READY`` for ``NODE_STATE_READY``."""

from __future__ import annotations

from typing import Any


def word(kind: Any, value: int) -> str:
    """Return the value's name without the enum's prefix, or the number of a value newer than this program.

    Args:
        kind: the enum; stubs give it another type than it has.
        value: its number.
    """
    by_number = kind.DESCRIPTOR.values_by_number
    prefix = str(by_number[0].name).removesuffix("UNSPECIFIED")
    return str(by_number[value].name).removeprefix(prefix) if value in by_number else str(value)
