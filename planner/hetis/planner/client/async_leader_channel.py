"""A channel to the leading planner, for asyncio; see `LeaderChannel`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio

from hetis.formats.endpoints import Endpoint, LeaderSearch
from hetis.planner.client.connection import Connection
from hetis.planner.client.errors import CallError, call_error
from hetis.planner.client.leader_channel import channel_options
from hetis.planner.client.leaders import NOT_LEADER, attempts_of, leader_of, search_for
from hetis.planner.client.preparing import CallDetails, prepared_details, prepared_request


class AsyncLeaderChannel:
    """A channel to the leader: for generated stubs, a ``grpc.aio.Channel`` for unary calls and response streams."""

    def __init__(self, connection: Connection, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._connection = connection
        self._sleep = sleep
        self._channels: dict[Endpoint, aio.Channel] = {}
        self.leaders = search_for(connection)
        self.to(self.leaders.present)  # unreadable files are detected now

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    def to(self, endpoint: Endpoint) -> aio.Channel:
        """Return a channel to one planner, whose calls are prepared and raise `CallError`."""
        if endpoint not in self._channels:
            connection, options = self._connection, channel_options(self._connection, endpoint)
            interceptors: list[aio.ClientInterceptor] = [_AsyncUnary(connection), _AsyncStreaming(connection)]
            self._channels[endpoint] = (
                aio.insecure_channel(endpoint.address, options, interceptors=interceptors)
                if connection.is_plain
                else aio.secure_channel(
                    endpoint.address, connection.channel_credentials(), options, interceptors=interceptors
                )
            )
        return self._channels[endpoint]

    def unary_unary(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """Return the callable for a unary method that generated stubs need."""

        async def call(request: Any, timeout: float | None = None, **settings: Any) -> Any:
            request = prepared_request(request)
            attempts = attempts_of(self.leaders, method, request, timeout)
            while True:
                endpoint = self.leaders.present
                one: Any = self.to(endpoint).unary_unary(method, *arguments, **named)
                try:
                    return await one(request, timeout=attempts.timeout_s, **settings)
                except CallError as error:
                    wait_s = attempts.next_wait_s(endpoint, error)
                if self.leaders.is_stale:
                    await asyncio.to_thread(self.leaders.refresh)
                if wait_s:
                    await self._sleep(wait_s)

        return call

    def stream_stream(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """Return the callable for a bidirectional stream to the last known leader, which may fail with NOT_LEADER."""

        def call(requests: Any = None, **settings: Any) -> Any:
            one: Any = self.to(self.leaders.present).stream_stream(method, *arguments, **named)
            return one(requests, metadata=aio.Metadata(*self._connection.metadata()), **settings)

        return call

    def unary_stream(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """Return the callable for a response stream. The caller reopens a broken one, which then goes to the leader."""

        def call(request: Any, **settings: Any) -> _AsyncStream:
            def open_stream(endpoint: Endpoint) -> Any:
                one: Any = self.to(endpoint).unary_stream(method, *arguments, **named)
                return one(request, **settings)

            return _AsyncStream(self.leaders, open_stream)

        return call


class _AsyncStream:
    """A response stream from the leader; a planner that at once says NOT_LEADER is replaced by its leader."""

    def __init__(self, leaders: LeaderSearch, open_stream: Callable[[Endpoint], Any]) -> None:
        self._leaders = leaders
        self._open_stream = open_stream
        self._endpoint = leaders.present
        self._call = open_stream(self._endpoint)

    async def __aiter__(self) -> AsyncIterator[Any]:
        tried, has_come = set[Endpoint](), False
        while True:
            try:
                async for response in self._call:
                    has_come = True
                    yield response
                return
            except grpc.RpcError as error:
                failed = call_error(error)
                if failed.code is not grpc.StatusCode.UNAVAILABLE:
                    raise
                goes_on = self._leaders.failed(self._endpoint, leader_of(failed), tried)
                if has_come or failed.reason != NOT_LEADER or not goes_on:
                    raise
                self._endpoint = self._leaders.present
                self._call = self._open_stream(self._endpoint)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


class _AsyncUnary(aio.UnaryUnaryClientInterceptor):
    """Prepares a unary call and adds the details to its failure."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        details = prepared_details(client_call_details, self._connection, unary=True)
        call = await continuation(_for_aio(details), prepared_request(request))
        try:
            await call
        except grpc.RpcError as error:
            raise call_error(error) from None
        return call


class _AsyncStreaming(aio.UnaryStreamClientInterceptor):
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        details = prepared_details(client_call_details, self._connection, unary=False)
        return await continuation(_for_aio(details), request)


def _for_aio(details: CallDetails) -> aio.ClientCallDetails:
    return aio.ClientCallDetails(
        details.method,
        details.timeout,
        aio.Metadata(*details.metadata),
        details.credentials,
        details.wait_for_ready,
    )
