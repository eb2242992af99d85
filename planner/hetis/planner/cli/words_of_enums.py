"""Enum values as people read them: ``READY`` of ``NODE_STATE_READY``."""

from __future__ import annotations

from typing import Any


def word(kind: Any, value: int) -> str:
    """The value's name without the enum's prefix; of a value that is newer than we are its number.

    Args:
        kind: the enum; stubs give it another type than it has.
        value: its number.
    """
    by_number = kind.DESCRIPTOR.values_by_number
    prefix = str(by_number[0].name).removesuffix("UNSPECIFIED")
    return str(by_number[value].name).removeprefix(prefix) if value in by_number else str(value)
