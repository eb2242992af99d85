"""The whole planner answers any bytes and messages with a documented status, and keeps working."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool

from hetis.planner.service.methods import METHODS
from tests.planner.service.process import REAL, Process
from tests.protocol.messages import random_message

OPTIONS = ("--listen", "127.0.0.1:0", "--status-page", "off", "--ready-json", "--set", "solver.processes=1")
NAMES = ("clusters/c", "clusters/c/nodes/n", "plans/p", "profiles/p", "clusters/c/replicas/r", "", "x", "ü" * 300)
ROUNDS = 10
Bad = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, grpc.Channel]]:
    with (
        Process(OPTIONS, folder=tmp_path_factory.mktemp("fuzz"), module=REAL) as process,
        grpc.insecure_channel(process.ready()["listen"][0]) as channel,
    ):
        yield process, channel


def method_of(path: str) -> Any:
    return descriptor_pool.Default().FindMethodByName(path.removeprefix("/").replace("/", "."))


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
        requests = [random_message(method_of(path).input_type, dice, texts=NAMES) for _ in range(3)]
        assert send(channel, path, [request.SerializeToString() for request in requests]) not in Bad, requests


def test_no_incident_came_of_it(serving: tuple[Process, grpc.Channel]) -> None:
    process, _ = serving
    process.signal(15)
    code, stderr = process.end()
    assert code == 0
    incidents = [line for line in stderr.splitlines() if line.startswith("{") and json.loads(line)["level"] == "error"]
    assert not incidents
