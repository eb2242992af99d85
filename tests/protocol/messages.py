"""Random valid messages, made from descriptors, with a preference for names and numbers that occur in the tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor, message, message_factory

from tests.planner.fleet.samples import CLUSTER, PLAN, REPLICA

UUIDS = tuple(f"00000000-0000-4000-8000-00000000000{i}" for i in range(3))
TEXTS = (CLUSTER, REPLICA, PLAN, f"{CLUSTER}/nodes/a", "a", "b", "a/0", "b/0", "r1", "", "x", "ü" * 300, "\0", *UUIDS)
NUMBERS = (0, 0, 1, 1, 2, 3, 4, 2**31 - 1)
LARGE = (2**32, 2**63 - 1)
DEPTH = 4


def random_message(
    kind: descriptor.Descriptor, dice: random.Random, depth: int = 0, texts: Sequence[str] = TEXTS
) -> message.Message:
    """Return a message that can be sent, whose contents need not make sense."""
    made = message_factory.GetMessageClass(kind)()
    for field in kind.fields:
        if dice.random() < 0.3 or (field.message_type is not None and depth >= DEPTH):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        times = dice.choice((0, 1, 1, 2)) if field.is_repeated else 1
        if field.message_type is not None:
            parts = [random_message(field.message_type, dice, depth + 1, texts) for _ in range(times)]
            if field.is_repeated:
                getattr(made, field.name).extend(parts)
            else:
                getattr(made, field.name).CopyFrom(parts[0])
        elif field.is_repeated:
            getattr(made, field.name).extend([random_value(field, dice, texts) for _ in range(times)])
        else:
            setattr(made, field.name, random_value(field, dice, texts))
    return made


def random_value(field: descriptor.FieldDescriptor, dice: random.Random, texts: Sequence[str]) -> Any:
    match field.cpp_type:
        case field.CPPTYPE_STRING if field.type == field.TYPE_BYTES:
            return dice.choice((b"", b"\xff\xfe", b"kind: Cluster", b"{}", b"a" * 1000))
        case field.CPPTYPE_STRING:
            return dice.choice(texts)
        case field.CPPTYPE_BOOL:
            return dice.random() < 0.5
        case field.CPPTYPE_ENUM:
            return dice.choice((0, 1, 1, 2, 2, 3, 4, 5, 99))
        case field.CPPTYPE_DOUBLE | field.CPPTYPE_FLOAT:
            return dice.choice((0.0, 1.0, -1.0, 1e308, float("nan"), float("inf")))
        case field.CPPTYPE_INT32:
            return dice.choice((*NUMBERS, -1))
        case field.CPPTYPE_INT64:
            return dice.choice((*NUMBERS, *LARGE, -1, -(2**63)))
        case field.CPPTYPE_UINT32:
            return dice.choice((*NUMBERS, 2**32 - 1))
        case _:
            return dice.choice((*NUMBERS, *LARGE, 2**64 - 1))
