"""The whole planner answers any bytes and messages with a documented status, and keeps working."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor, message, message_factory

from hetis.planner.service.methods import METHODS
from hetis.v1 import (
    agent_service_pb2,
    audit_service_pb2,
    cluster_service_pb2,
    dispatch_service_pb2,
    plan_service_pb2,
    profile_service_pb2,
)
from tests.planner.service.process import REAL, Process

OPTIONS = ("--listen", "127.0.0.1:0", "--status-page", "off", "--ready-json", "--set", "solver.processes=1")
NAMES = ("clusters/c", "clusters/c/nodes/n", "plans/p", "profiles/p", "clusters/c/replicas/r", "", "x", "ü" * 300)
ROUNDS = 10
SERVICES: dict[str, Any] = {
    name: service
    for stubs in (
        agent_service_pb2,
        audit_service_pb2,
        cluster_service_pb2,
        dispatch_service_pb2,
        plan_service_pb2,
        profile_service_pb2,
    )
    for name, service in stubs.DESCRIPTOR.services_by_name.items()
}
Bad = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, grpc.Channel]]:
    with (
        Process(OPTIONS, folder=tmp_path_factory.mktemp("fuzz"), module=REAL) as process,
        grpc.insecure_channel(process.ready()["listen"][0]) as channel,
    ):
        yield process, channel


def method_of(path: str) -> Any:
    service, name = path.removeprefix("/hetis.v1.").split("/")
    return SERVICES[service].methods_by_name[name]


def send(channel: grpc.Channel, path: str, raw: list[bytes]) -> grpc.StatusCode:
    """Return the status of a call with these bytes."""
    method = method_of(path)
    try:
        if method.client_streaming:
            for _ in channel.stream_stream(path)(iter(raw), timeout=2):
                pass
        elif method.server_streaming:
            for number, _ in enumerate(channel.unary_stream(path)(raw[0], timeout=0.3)):
                if number == 20:
                    break
        else:
            channel.unary_unary(path)(raw[0], timeout=3)
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined, no-any-return]
    return grpc.StatusCode.OK


def random_message(kind: descriptor.Descriptor, dice: random.Random, depth: int = 0) -> message.Message:
    """Return a valid message, some of whose fields have values that a sane caller would not send."""
    made = message_factory.GetMessageClass(kind)()
    for field in kind.fields:
        if dice.random() < 0.5 or (field.message_type is not None and depth > 2):
            continue
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if is_map:
            continue
        if field.message_type is not None:
            parts = [random_message(field.message_type, dice, depth + 1) for _ in range(dice.choice((1, 1, 2)))]
            if field.is_repeated:
                getattr(made, field.name).extend(parts)
            else:
                getattr(made, field.name).CopyFrom(parts[0])
            continue
        values = [random_value(field, dice) for _ in range(dice.choice((1, 2)))]
        if field.is_repeated:
            getattr(made, field.name).extend(values)
        else:
            setattr(made, field.name, values[0])
    return made


def random_value(field: descriptor.FieldDescriptor, dice: random.Random) -> Any:
    match field.cpp_type:
        case field.CPPTYPE_STRING if field.type == field.TYPE_BYTES:
            return dice.choice((b"", b"\xff\xfe", b"kind: Cluster", b"{}", b"a" * 1000))
        case field.CPPTYPE_STRING:
            return dice.choice(NAMES)
        case field.CPPTYPE_BOOL:
            return True
        case field.CPPTYPE_ENUM:
            return dice.choice([0, 1, 2, 99])
        case field.CPPTYPE_DOUBLE | field.CPPTYPE_FLOAT:
            return dice.choice([0.0, -1.0, 1e308, float("nan"), float("inf")])
        case field.CPPTYPE_INT32 | field.CPPTYPE_INT64:
            return dice.choice([0, -1, 1, 2**31 - 1])
        case _:
            return dice.choice([0, 1, 2**32 - 1])


@pytest.mark.parametrize("path", sorted(METHODS))
def test_random_bytes_have_a_documented_status(path: str, serving: tuple[Process, grpc.Channel]) -> None:
    dice = random.Random(path)
    _, channel = serving
    for _ in range(ROUNDS):
        raw = [dice.randbytes(dice.choice((0, 1, 10, 200, 5000))) for _ in range(3)]
        assert send(channel, path, raw) not in Bad, [part.hex() for part in raw]


@pytest.mark.parametrize("path", sorted(METHODS))
def test_random_messages_have_a_documented_status(path: str, serving: tuple[Process, grpc.Channel]) -> None:
    dice = random.Random(path)
    _, channel = serving
    for _ in range(ROUNDS):
        requests = [random_message(method_of(path).input_type, dice) for _ in range(3)]
        assert send(channel, path, [request.SerializeToString() for request in requests]) not in Bad, requests


def test_no_incident_came_of_it(serving: tuple[Process, grpc.Channel]) -> None:
    process, _ = serving
    process.signal(15)
    code, stderr = process.end()
    assert code == 0
    incidents = [line for line in stderr.splitlines() if line.startswith("{") and json.loads(line)["level"] == "error"]
    assert not incidents
