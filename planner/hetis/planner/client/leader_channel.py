"""A channel to the leading planner, for code without an event loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from hetis.formats.endpoints import Endpoint, LeaderSearch
from hetis.planner.client.connection import CHANNEL_OPTIONS, SEVERAL_OPTIONS, Connection
from hetis.planner.client.errors import CallError, call_error
from hetis.planner.client.leaders import NOT_LEADER, attempts_of, leader_of, search_for
from hetis.planner.client.preparing import prepared_details, prepared_request


class LeaderChannel:
    """A channel to the leader: for generated stubs, a ``grpc.Channel`` for unary calls and response streams.

    A unary call reaches the leader even if that changes during the call: a planner that does not lead names the leader,
    and if one does not answer, the next is tried. The request and its ``request_id`` stay the same.
    """

    def __init__(self, connection: Connection, sleep: Callable[[float], None] = time.sleep) -> None:
        self._connection = connection
        self._sleep = sleep
        self._lock = threading.Lock()
        self._channels: dict[Endpoint, tuple[grpc.Channel, grpc.Channel]] = {}
        self._is_closed = False
        self.leaders = search_for(connection)
        self.to(self.leaders.present)  # unreadable files are detected now

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for channel, _ in self._channels.values():
                channel.close()

    def to(self, endpoint: Endpoint) -> grpc.Channel:
        """Return a channel to one planner, whose calls are prepared and raise `CallError`."""
        with self._lock:
            if self._is_closed:
                raise ValueError("the client is closed")
            if endpoint not in self._channels:
                connection = self._connection
                options = channel_options(connection, endpoint)
                channel = (
                    grpc.insecure_channel(endpoint.address, options)
                    if connection.is_plain
                    else grpc.secure_channel(endpoint.address, connection.channel_credentials(), options)
                )
                prepared = grpc.intercept_channel(channel, _Unary(connection), _Streaming(connection))
                self._channels[endpoint] = channel, prepared
            return self._channels[endpoint][1]

    def unary_unary(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """Return the callable for a unary method that generated stubs need."""

        def call(request: Any, timeout: float | None = None, **settings: Any) -> Any:
            request = prepared_request(request)
            attempts = attempts_of(self.leaders, method, request, timeout)
            while True:
                endpoint = self.leaders.present
                one = self.to(endpoint).unary_unary(method, *arguments, **named)
                try:
                    return one(request, timeout=attempts.timeout_s, **settings)
                except CallError as error:
                    wait_s = attempts.next_wait_s(endpoint, error)
                self.leaders.refresh()
                if wait_s:
                    self._sleep(wait_s)

        return call

    def stream_stream(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """Return the callable for a bidirectional stream to the last known leader, which may fail with NOT_LEADER."""

        def call(requests: Any, **settings: Any) -> Any:
            one: Any = self.to(self.leaders.present).stream_stream(method, *arguments, **named)
            return one(requests, metadata=self._connection.metadata(), **settings)

        return call

    def unary_stream(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """Return the callable for a response stream. The caller reopens a broken one, which then goes to the leader."""

        def call(request: Any, **settings: Any) -> _Stream:
            def open_stream(endpoint: Endpoint) -> Any:
                return self.to(endpoint).unary_stream(method, *arguments, **named)(request, **settings)

            return _Stream(self.leaders, open_stream)

        return call


class _Stream:
    """A response stream from the leader; a planner that at once says NOT_LEADER is replaced by its leader."""

    def __init__(self, leaders: LeaderSearch, open_stream: Callable[[Endpoint], Any]) -> None:
        self._leaders = leaders
        self._open_stream = open_stream
        self._tried = set[Endpoint]()
        self._has_come = False
        self._endpoint = leaders.present
        self._call = open_stream(self._endpoint)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            try:
                response = next(self._call)
            except grpc.RpcError as error:
                failed = call_error(error)
                if failed.code is not grpc.StatusCode.UNAVAILABLE:
                    raise
                goes_on = self._leaders.failed(self._endpoint, leader_of(failed), self._tried)
                if self._has_come or failed.reason != NOT_LEADER or not goes_on:
                    raise
                self._endpoint = self._leaders.present
                self._call = self._open_stream(self._endpoint)
            else:
                self._has_come = True
                return response

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


def channel_options(connection: Connection, endpoint: Endpoint) -> list[tuple[str, str | int]]:
    """Return channel options. With several planners the client retries elsewhere; with one, gRPC retries."""
    options = list(CHANNEL_OPTIONS if len(connection.addresses) == 1 and not endpoint.name else SEVERAL_OPTIONS)
    if endpoint.name:
        options.append(("grpc.default_authority", endpoint.name))
        if not connection.is_plain:
            options.append(("grpc.ssl_target_name_override", endpoint.name))
    return options


class _Unary(grpc.UnaryUnaryClientInterceptor):
    """Prepares a unary call and adds the details to its failure."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        details = prepared_details(client_call_details, self._connection, unary=True)
        call = continuation(details, prepared_request(request))
        error = call.exception()  # waits for the answer
        if error is None:
            return call
        raise call_error(error) from None


class _Streaming(grpc.UnaryStreamClientInterceptor):
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(prepared_details(client_call_details, self._connection, unary=False), request)
