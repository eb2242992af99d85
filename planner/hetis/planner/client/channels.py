"""Channels to the leading planner, with and without an event loop, and the search for it among several planners."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
from grpc import aio

from hetis.commands.endpoints import STREAM_OPEN, Endpoint, LeaderSearch, open_channel
from hetis.formats.files import FileStamp
from hetis.planner.client.attempts import NOT_LEADER, attempts_of, leader_of
from hetis.planner.client.connection import (
    CHANNEL_OPTIONS,
    SEVERAL_OPTIONS,
    Connection,
    prepared_request,
)
from hetis.planner.client.errors import call_error

T = TypeVar("T")
SLOW_AFTER_S = 1.0  # a call without an answer is reported after so long,
SLOW_AGAIN_S = 5.0  # and again after so long


def at_once(work: Awaitable[T]) -> T:
    """Return the result of work of which every part is done when it is awaited, without an event loop."""
    try:
        next(work.__await__())
    except StopIteration as done:
        found: T = done.value
        return found
    raise AssertionError("it waits for an event loop")


def each_at_once(work: AsyncGenerator[T, None]) -> Iterator[T]:
    """Yield what such work yields."""
    try:
        while True:
            try:
                one = at_once(anext(work))
            except StopAsyncIteration:
                return
            yield one
    finally:
        at_once(work.aclose())


class _AsyncStream:
    """A response stream from the leader. After an immediate NOT_LEADER it is opened at the named leader."""

    def __init__(
        self,
        leaders: LeaderSearch,
        open_stream: Callable[[Endpoint], Any],
        has_newer_credentials: Callable[[], bool],
        on_open: Callable[[], object] | None = None,
    ) -> None:
        """Open a stream.

        Args:
            leaders: the search for the leader.
            open_stream: opens the stream at one planner.
            has_newer_credentials: whether the files or the token have changed since the stream was opened.
            on_open: called when the planner has opened the stream, which may be long before the first response.
        """
        self._leaders = leaders
        self._open_stream = open_stream
        self.has_newer_credentials = has_newer_credentials
        self._on_open = on_open
        self._tried = set[Endpoint]()
        self._has_come = False
        self._endpoint = leaders.present
        self._call = open_stream(self._endpoint)

    async def __aiter__(self) -> AsyncGenerator[Any, None]:
        while True:
            try:
                if self._on_open is not None:
                    self._begins(await self._initial_metadata())
                async for response in self._responses():
                    self._has_come = True
                    yield response
                return
            except grpc.RpcError as error:
                self._reopen(error)

    async def _initial_metadata(self) -> Any:
        return await self._call.initial_metadata()

    def _responses(self) -> AsyncIterable[Any]:
        return cast(AsyncIterable[Any], self._call)

    def _reopen(self, error: grpc.RpcError) -> None:
        """Open the stream at the leader that an error names, or raise the error if that cannot help."""
        failed = call_error(error)
        if failed.code is not grpc.StatusCode.UNAVAILABLE:
            raise error
        goes_on = self._leaders.failed(self._endpoint, leader_of(failed), self._tried)
        if self._has_come or failed.reason != NOT_LEADER or not goes_on:
            raise error
        self._endpoint = self._leaders.present
        self._call = self._open_stream(self._endpoint)

    def _begins(self, metadata: Any) -> None:
        # The key is absent from a proxy's answer, and from that of a planner that failed before it opened the stream.
        if self._on_open is not None and STREAM_OPEN in [tuple(one) for one in metadata or ()]:
            self._on_open()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


class _Stream(_AsyncStream):
    """The same for code without an event loop."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._each = each_at_once(aiter(self))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._each)

    async def _initial_metadata(self) -> Any:
        return self._call.initial_metadata()

    async def _responses(self) -> AsyncGenerator[Any, None]:
        for response in self._call:
            yield response


@dataclass(slots=True, eq=False, kw_only=True)
class _Opened:
    """A channel to one planner, the stamps of the files that it was opened with, and the number of calls on it."""

    channel: Any
    stamps: tuple[FileStamp | None, ...]
    num_calls: int = 0


class AsyncLeaderChannel:
    """A channel to the leader, for asyncio. Generated stubs use it.

    A unary call reaches the leader even if that changes during the call: a planner that does not lead names the leader,
    and if one does not answer, the next is tried. The request and its ``request_id`` stay the same.

    Once certificates have been renewed, calls begin on a new channel. The old one stays until its last call has ended.
    """

    library: Any = aio
    stream: type[_AsyncStream] = _AsyncStream

    def __init__(self, connection: Connection, sleep: Callable[[float], Any] = asyncio.sleep) -> None:
        self._connection, self._sleep = connection, sleep
        self._stamps = connection.file_stamps
        self._credentials = None if connection.is_plain else connection.channel_credentials()
        self._last_token = list[tuple[str, str]]()
        self._lock = threading.Lock()
        self._opened: dict[Endpoint, _Opened] = {}
        self._replaced = list[_Opened]()  # opened with earlier files
        self._is_closed = False
        self.has_standby_answered = False  # whether a read got only a standby's answer
        self.leaders = LeaderSearch(connection.addresses, is_plain=connection.is_plain)

    @contextmanager
    def _calling(self, endpoint: Endpoint) -> Iterator[_Opened]:
        """Yield the channel to one planner for a call that ends when the context does."""
        with self._lock:
            if self._is_closed:
                raise ValueError("the client is closed")
            self._renew()
            if endpoint not in self._opened:
                # gRPC's own retries unless this channel can try another planner
                is_alone = len(self._connection.addresses) == 1 and not endpoint.name
                options = CHANNEL_OPTIONS if is_alone else SEVERAL_OPTIONS
                channel = open_channel(self.library, endpoint, options, self._credentials)
                self._opened[endpoint] = _Opened(channel=channel, stamps=self._stamps)
            opened = self._opened[endpoint]
            opened.num_calls += 1
        try:
            yield opened
        finally:
            with self._lock:
                opened.num_calls -= 1

    def _renew(self) -> None:
        """Use the files as they are from now on if they have changed, unless they are missing or half-written."""
        self._replaced = [old for old in self._replaced if old.num_calls]  # gRPC closes what nothing refers to
        stamps = self._connection.file_stamps
        if stamps == self._stamps:
            return
        credentials = self._connection.renewed_credentials()
        if credentials is not None and stamps == self._connection.file_stamps:
            self._credentials, self._stamps = credentials, stamps
            self._replaced += self._opened.values()
            self._opened.clear()

    def unary_unary(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        async def call(request: Any, timeout: float | None = None, *, metadata: Any = None, **settings: Any) -> Any:
            request = prepared_request(request)
            attempts = attempts_of(self.leaders, request, timeout)
            while True:
                endpoint = self.leaders.present
                try:
                    with self._calling(endpoint) as opened:
                        one: Any = opened.channel.unary_unary(method, *arguments, **named)
                        sent = {"timeout": attempts.timeout_s, "metadata": self.metadata(metadata), **settings}
                        answer, behind = await self._answer(one, request, sent)
                        wait_s = 0.0 if attempts.takes(endpoint, answer, behind) else None
                except grpc.RpcError as error:
                    wait_s = attempts.next_wait_s(endpoint, call_error(error))
                if wait_s is None:
                    self.has_standby_answered |= attempts.is_of_standby
                    return attempts.answer
                await self._refresh()
                if wait_s:
                    await self.wait(wait_s)

        return call

    async def _answer(self, call: Any, request: Any, settings: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the answer of one planner, and the metadata behind it."""
        done = call(request, **settings)
        return await done, await done.trailing_metadata()

    async def _refresh(self) -> None:
        """Resolve names again if that is due."""
        if self.leaders.is_stale:
            await asyncio.to_thread(self.leaders.refresh)

    async def wait(self, seconds: float) -> None:
        await self._sleep(seconds)

    async def close(self) -> None:
        for channel in self._close():
            await channel.close()

    def _close(self) -> list[Any]:
        """Allow no more calls, and return the channels to close. Without the lock, which calls take as they end."""
        with self._lock:
            self._is_closed = True
            return [opened.channel for opened in (*self._opened.values(), *self._replaced)]

    def metadata(self, given: Any) -> tuple[tuple[str, Any], ...]:
        """Return a call's own metadata, with the connection's credentials added unless the call has its own."""
        own = tuple(given or ())
        return own if any(key == "authorization" for key, _ in own) else (*own, *self._token())

    def _token(self) -> list[tuple[str, str]]:
        """Return the connection's credentials, the last ones while the token file is missing or half-written."""
        try:
            found = self._connection.metadata()
        except OSError:
            if not self._last_token:
                raise
            found = []
        self._last_token = found or self._last_token
        return self._last_token

    def stream_stream(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """Return the callable for a bidirectional stream to the last known leader, which may fail with NOT_LEADER."""

        def call(requests: Any = None, *, metadata: Any = None, **settings: Any) -> Any:
            def begin(opened: _Opened) -> Any:
                one = opened.channel.stream_stream(method, *arguments, **named)
                return one(requests, metadata=self.metadata(metadata), **settings)

            return self._begun(self.leaders.present, begin)

        return call

    def _begun(self, endpoint: Endpoint, begin: Callable[[_Opened], Any]) -> Any:
        """Return a stream that ``begin`` opens, and that counts as a call on its channel until it ends."""
        with ExitStack() as ending:
            stream = begin(ending.enter_context(self._calling(endpoint)))
            self._call_when_done(stream, ending.pop_all().close)
        return stream

    @staticmethod
    def _call_when_done(stream: Any, end: Callable[[], None]) -> None:
        """Call ``end`` when a stream has ended, at once if it has already."""
        stream.add_done_callback(lambda _: end())

    def unary_stream(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """Return the callable for a response stream. The caller reopens a broken one, which then goes to the leader."""

        def call(
            request: Any, *, metadata: Any = None, on_open: Callable[[], object] | None = None, **settings: Any
        ) -> _AsyncStream:
            used: tuple[object, object] = None, None

            def begin(opened: _Opened) -> Any:
                nonlocal used
                sent = self.metadata(metadata)
                used = opened.stamps, sent
                one = opened.channel.unary_stream(method, *arguments, **named)
                return one(request, metadata=sent, **settings)

            def has_newer_credentials() -> bool:
                return used != (self._connection.file_stamps, self.metadata(metadata))

            return self.stream(
                self.leaders, lambda endpoint: self._begun(endpoint, begin), has_newer_credentials, on_open
            )

        return call


class LeaderChannel(AsyncLeaderChannel):
    """The same for code without an event loop: what its coroutines await is done at once."""

    library = grpc
    stream = _Stream

    def __init__(
        self,
        connection: Connection,
        sleep: Callable[[float], None] = time.sleep,
        on_slow: Callable[[list[str]], object] | None = None,
    ) -> None:
        self._on_slow = on_slow
        super().__init__(connection, sleep)

    async def close(self) -> None:
        for channel in self._close():
            channel.close()

    @staticmethod
    def _call_when_done(stream: Any, end: Callable[[], None]) -> None:
        if not stream.add_callback(end):
            end()

    def unary_unary(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        asynchronous = super().unary_unary(method, *arguments, **named)

        def call(*given: Any, **settings: Any) -> Any:
            with self._reported_if_slow():
                return at_once(asynchronous(*given, **settings))

        return call

    async def _answer(self, call: Any, request: Any, settings: Mapping[str, Any]) -> tuple[Any, Any]:
        answer, done = call.with_call(request, **settings)
        return answer, done.trailing_metadata()

    async def _refresh(self) -> None:
        self.leaders.refresh()

    async def wait(self, seconds: float) -> None:
        self._sleep(seconds)

    @contextmanager
    def _reported_if_slow(self) -> Iterator[None]:
        """Report from another thread, while the context lasts, which planner the call waits for."""
        if (on_slow := self._on_slow) is None:
            yield
            return
        ended = threading.Event()

        def report() -> None:
            wait_s = SLOW_AFTER_S
            while not ended.wait(wait_s):
                on_slow([endpoint.address for endpoint in self.leaders.in_turn])
                wait_s = SLOW_AGAIN_S

        threading.Thread(target=report, daemon=True).start()
        try:
            yield
        finally:
            ended.set()
