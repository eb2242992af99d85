"""Names of enum values, also of those that only a newer peer knows."""

from __future__ import annotations

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper


def name_of(enum: object, value: int) -> str:
    """Its name in ``enum``, a generated one; the number where this version has none: open enums may hold any."""
    assert isinstance(enum, EnumTypeWrapper)
    found = enum.DESCRIPTOR.values_by_number.get(value)
    return str(value) if found is None else str(found.name)
