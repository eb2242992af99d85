"""Names of enum values, including those that only a newer peer knows."""

from __future__ import annotations

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper


def name_of(enum: object, value: int) -> str:
    """Return a value's name in a generated enum, or its number if this version has no name: open enums may hold any."""
    assert isinstance(enum, EnumTypeWrapper)
    found = enum.DESCRIPTOR.values_by_number.get(value)
    return str(value) if found is None else str(found.name)
