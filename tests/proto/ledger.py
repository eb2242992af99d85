"""Every number that the contract ever assigned: ``python -m tests.proto.ledger`` adds the new ones.

A line of numbers.txt is ``message.number name type`` or ``enum.number name``. Lines are added, never changed or
removed: a removed field keeps its line here, and its number and name as `reserved` in the .proto file.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from tests.proto.descriptors import enums, messages

LEDGER = Path(__file__).with_name("numbers.txt")


def given_away() -> dict[str, str]:
    """Return the ledger, from number to name and type."""
    lines = LEDGER.read_text(encoding="utf-8").splitlines() if LEDGER.exists() else []
    return dict(line.split(" ", 1) for line in lines)


def in_use() -> dict[str, str]:
    """Return the same from the .proto files."""
    used = dict[str, str]()
    for name, message in messages():
        used |= {f"{name}.{field.number}": f"{field.name} {_type(field)}" for field in message.field}
    for name, enum in enums():
        used |= {f"{name}.{value.number}": value.name for value in enum.value}
    return used


def reserved() -> set[str]:
    """Return the reserved numbers and names."""
    found = set[str]()
    for name, message in messages():
        found |= {f"{name}.{number}" for span in message.reserved_range for number in range(span.start, span.end)}
        found |= {f"{name} {word}" for word in message.reserved_name}
    for name, enum in enums():
        # The end of a reserved range is inclusive for enums and exclusive for messages.
        found |= {f"{name}.{number}" for span in enum.reserved_range for number in range(span.start, span.end + 1)}
        found |= {f"{name} {word}" for word in enum.reserved_name}
    return found


def _type(field: FieldDescriptorProto) -> str:
    word = field.type_name.lstrip(".") or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return f"repeated {word}" if field.label == field.LABEL_REPEATED else word


if __name__ == "__main__":
    known = given_away()
    new = {number: what for number, what in in_use().items() if number not in known}
    with LEDGER.open("a", encoding="utf-8") as file:
        file.writelines(f"{number} {what}\n" for number, what in new.items())
    print(f"{len(new)} numbers added to {LEDGER}")
