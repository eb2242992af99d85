"""A real server on loopback around `FakePlanner`, and channels to it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hetis.planner.service.calls import Calls
from hetis.planner.service.identity.credentials import Authenticator, Credentials, NoCredentials, Tokens
from hetis.planner.service.limits import WriteRates
from hetis.planner.service.observability.metrics import ServiceMetrics
from hetis.planner.service.observability.telemetry import Telemetry
from hetis.planner.service.server import PlannerServer
from tests.planner.service.fakes import FakePlanner

T = TypeVar("T")


@dataclass(kw_only=True)
class Served:
    planner: FakePlanner
    server: PlannerServer
    calls: Calls
    metrics: ServiceMetrics
    address: str
    channel: grpc.aio.Channel


@asynccontextmanager
async def served(
    *,
    authenticator: Authenticator | None = None,
    server_credentials: grpc.ServerCredentials | None = None,
    channel_credentials: grpc.ChannelCredentials | None = None,
    writes: WriteRates | None = None,
    max_connections: int | None = None,
) -> AsyncIterator[Served]:
    planner = FakePlanner()
    metrics = ServiceMetrics("0")
    calls = Calls(authenticator or NoCredentials(), Telemetry(metrics), writes=writes)
    credentials = None if server_credentials is None else lambda: server_credentials
    server = PlannerServer(planner.servicings, calls, credentials=credentials, max_connections=max_connections)
    address = server.listen("127.0.0.1:0")
    await server.start()
    try:
        async with channel_to(address, channel_credentials) as channel:
            yield Served(planner=planner, server=server, calls=calls, metrics=metrics, address=address, channel=channel)
    finally:
        await server.stop_at_once()


def channel_to(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    # A separate connection per test: gRPC shares them between channels of equal arguments.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def by_tokens(path: str) -> Credentials:
    tokens = Tokens.load(path)
    return Credentials(tokens=lambda: tokens, trust_domain=None, clock=time.time)


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    """Return the error with which a call or stream ends."""
    try:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
            await _ended_well(call)
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call succeeded")


async def _ended_well(call: Any) -> None:
    """Read to the end without raising the error with which a stream may have ended."""
    if await call.code() is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """Return the details of an error by the names of their messages."""
    status: status_pb2.Status | None = None
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
    assert status is not None, f"no details: {error}"
    assert status.code == error.code().value[0]
    found = {}
    for packed in status.details:
        message = getattr(error_details_pb2, packed.TypeName().rsplit(".", 1)[1])()
        assert packed.Unpack(message)
        found[packed.TypeName().rsplit(".", 1)[1]] = message
    return found


def reason_of(error: grpc.aio.AioRpcError) -> str:
    info = details_of(error)["ErrorInfo"]
    assert info.domain == "hetis"
    return str(info.reason)


__all__ = ["Served", "by_tokens", "channel_to", "details_of", "failure_of", "reason_of", "rpc_status", "served"]
