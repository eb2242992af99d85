"""Every message survives the wire and JSON, filled or empty."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.proto.descriptors import SOURCES

F = FieldDescriptor
SCALARS: dict[int, st.SearchStrategy[object]] = {
    F.TYPE_BOOL: st.booleans(),
    F.TYPE_STRING: st.text(max_size=8),
    F.TYPE_BYTES: st.binary(max_size=8),
    F.TYPE_DOUBLE: st.floats(allow_nan=False),
    F.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    F.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    F.TYPE_UINT32: st.integers(0, 2**32 - 1),
    F.TYPE_UINT64: st.integers(0, 2**64 - 1),
}
# JSON has its own form for these, with limits.
WELL_KNOWN: dict[str, st.SearchStrategy[dict[str, int]]] = {
    "google.protobuf.Duration": st.fixed_dictionaries({"seconds": st.integers(0, 10**9)}),
    "google.protobuf.Timestamp": st.fixed_dictionaries({"seconds": st.integers(0, 10**9)}),
    "google.protobuf.FieldMask": st.just({}),
}


def all_messages() -> Iterator[Descriptor]:
    for source in SOURCES:
        module = importlib.import_module(f"hetis.v1.{Path(source).stem}_pb2")
        yield from module.DESCRIPTOR.message_types_by_name.values()


MESSAGES = sorted(all_messages(), key=lambda message: message.full_name)


def filled(message: Descriptor, depth: int = 0) -> st.SearchStrategy[Message]:
    """Messages of a kind: every field is set or not, messages inside down to four deep."""
    cls = GetMessageClass(message)
    if message.full_name in WELL_KNOWN:
        return WELL_KNOWN[message.full_name].map(lambda fields: cls(**fields))

    @st.composite
    def build(draw: st.DrawFn) -> Message:
        values: dict[str, object] = {}
        taken = set[str]()
        for field in message.fields:
            oneof = field.containing_oneof
            if (oneof is not None and oneof.name in taken) or not draw(st.booleans()):
                continue
            if field.message_type is not None and not field.message_type.GetOptions().map_entry and depth >= 4:
                continue
            if oneof is not None:
                taken.add(oneof.name)
            values[field.name] = draw(_values(field, depth))
        return cls(**values)

    return build()


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[object]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2)
    one: st.SearchStrategy[object]
    if field.message_type is not None:
        one = st.deferred(lambda: filled(field.message_type, depth + 1))
    elif field.enum_type is not None:
        one = st.sampled_from([value.number for value in field.enum_type.values])
    else:
        one = SCALARS[field.type]
    return st.lists(one, max_size=2) if field.is_repeated else one


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_message_survives_the_wire_and_json(message: Descriptor, data: st.DataObject) -> None:
    value = data.draw(filled(message))
    assert type(value).FromString(value.SerializeToString()) == value
    assert json_format.Parse(json_format.MessageToJson(value), type(value)()) == value


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_an_empty_message_takes_no_bytes(message: Descriptor) -> None:
    assert GetMessageClass(message)().SerializeToString() == b""
