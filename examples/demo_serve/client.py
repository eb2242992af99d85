"""The demo's requests to vLLM: chats over HTTP, and the devices of head groups, as the agent asks for them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from hetis.v1.executor_service_pb2 import ReadHeadMapsRequest
from hetis.v1.executor_service_pb2_grpc import ExecutorServiceStub
from hetis.v1.report_pb2 import DeviceStatus

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heads:
    """The device of each head group of the only running request (empty if none runs), and which devices are up."""

    owners: tuple[str, ...]
    up: tuple[str, ...]


class Client:
    """Client of the server at ``url``, whose executor listens at ``engine``."""

    def __init__(self, url: str, engine: Path, replica: str) -> None:
        self._url, self._replica = url, replica
        self._channel = grpc.insecure_channel(f"unix:{engine}", options=[("grpc.default_authority", "localhost")])
        self._executor = ExecutorServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def heads(self) -> Heads:
        """Return the heads as they are between two steps."""
        for piece in self._executor.ReadHeadMaps(ReadHeadMapsRequest(replica=self._replica), timeout=60):
            for head_map in piece.head_maps:
                names = [device.name for device in head_map.devices]
                lost = DeviceStatus.DEVICE_STATUS_LOST
                up = tuple(device.name for device in head_map.devices if device.status != lost)
                owners = [names[owner] for request in head_map.requests[:1] for owner in request.owners]
                return Heads(tuple(owners), up)
        return Heads((), ())

    def metrics(self) -> dict[str, float]:
        """Return every sample by its name with labels."""
        lines = self._open("/metrics").read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def stream_chat(self, body: Json) -> Iterator[Json]:
        """Yield chunks of an answer as they arrive."""
        with self._open("/v1/chat/completions", body | {"stream": True}) as answer:
            for line in answer:
                text = line.decode().strip().removeprefix("data: ")
                if text == "[DONE]":
                    return
                if text:
                    yield json.loads(text)

    def _open(self, path: str, body: Json | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return urllib.request.urlopen(urllib.request.Request(self._url + path, data, headers), timeout=600)
