"""Connections that have not greeted delay no engine, and are closed in time."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic
from typing import Any

import pytest
import torch

from hetis.runtime.transport.channel import Channel
from hetis.runtime.transport.frames import (
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Frame,
    FrameKind,
    VersionError,
    bytes_of,
    header_of,
    read_header,
)
from hetis.runtime.transport.pipes import SharedFile, ShmPipe, TcpPipe, is_supported
from hetis.runtime.worker.core import MOST, PendingConnections

PING = Frame(kind=FrameKind.PING, epoch=1, session=1, parts=(torch.arange(5),))
GREETING = header_of(PING) + b"".join(bytes(bytes_of(part)) for part in PING.parts)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield listening


def connected(listener: socket.socket) -> socket.socket:
    return socket.create_connection(listener.getsockname(), timeout=10)


def one_of(pending: PendingConnections) -> tuple[Channel, Frame]:
    """Return the next that has greeted."""
    until_s = monotonic() + 10
    while not (found := pending.completed(0.1)):
        assert monotonic() < until_s, "nobody has greeted"
    [one] = found
    return one


def check_next(pending: PendingConnections, other: socket.socket) -> None:
    """Check that the next that has greeted is ``other``."""
    channel, frame = one_of(pending)
    assert channel.name == "tcp:{}:{}".format(*other.getsockname())
    assert (frame.kind, bytes(frame.raw)) == (PING.kind, bytes(bytes_of(PING.parts[0])))
    channel.close()


def check_closed(other: socket.socket) -> None:
    other.settimeout(10)
    assert other.recv(1) == b""


def test_who_greets_is_handed_out_before_those_that_came_earlier_and_are_silent(listener: socket.socket) -> None:
    pending = PendingConnections(listener, stall_s=10)
    with connected(listener) as silent, connected(listener) as speaking:
        assert pending.completed(0.0) == []
        speaking.sendall(GREETING)
        check_next(pending, speaking)
        assert pending.completed(0.0) == []
        silent.sendall(GREETING)
        check_next(pending, silent)


def test_a_greeting_is_read_as_it_arrives_and_nobody_waits_for_its_rest(listener: socket.socket) -> None:
    """This used to hold a worker up for 10 s, or for 1 s while it served an engine."""
    pending = PendingConnections(listener, stall_s=60)
    with connected(listener) as slow, connected(listener) as quick:
        begun_s = monotonic()
        for at in range(len(GREETING) - 1):
            slow.sendall(GREETING[at : at + 1])
            assert pending.completed(0.0) == []
        assert monotonic() < begun_s + len(GREETING) / 2
        quick.sendall(GREETING)
        check_next(pending, quick)
        slow.sendall(GREETING[-1:])
        check_next(pending, slow)


@pytest.mark.parametrize("says", [b"", GREETING[:4], GREETING[:-1]])
def test_who_has_not_greeted_is_closed_in_time_whatever_it_has_said(listener: socket.socket, says: bytes) -> None:
    clock = Clock()
    pending = PendingConnections(listener, stall_s=10, clock=clock)
    with connected(listener) as silent:
        assert pending.completed(1.0) == []
        clock.now_s = 9.9
        silent.sendall(says)
        assert pending.completed(0.1) == []
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.recv(1)
        clock.now_s = 10.0
        assert pending.completed(0.0) == []
        check_closed(silent)


def test_the_oldest_of_too_many_makes_room(listener: socket.socket) -> None:
    pending = PendingConnections(listener, stall_s=10)
    with ExitStack() as opened:
        opened.callback(pending.close)
        first, *others = [opened.enter_context(connected(listener)) for _ in range(MOST + 1)]
        for other in others:
            other.sendall(GREETING[:4])
        while pending.completed(0.1) == [] and len(pending) < MOST:
            pass
        assert pending.completed(0.1) == []
        check_closed(first)
        others[-1].sendall(GREETING[4:])
        check_next(pending, others[-1])


def test_who_has_greeted_makes_no_room_for_others(listener: socket.socket) -> None:
    pending = PendingConnections(listener, stall_s=10)
    with connected(listener) as engine, ExitStack() as opened:
        opened.callback(pending.close)
        assert pending.completed(1.0) == []
        engine.sendall(GREETING)
        for _ in range(MOST):
            opened.enter_context(connected(listener))
        check_next(pending, engine)


@pytest.mark.skipif(not is_supported(), reason="no shared memory here")
def test_both_ends_learn_that_they_are_of_different_versions(
    listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    pending = PendingConnections(listener, stall_s=10.0)
    other = struct.pack("<IH", MAGIC, VERSION + 1) + GREETING[6:]
    with connected(listener) as engine:
        engine.sendall(other)
        until_s = monotonic() + 10
        while not caplog.records:
            assert pending.completed(0.1) == []
            assert monotonic() < until_s, "nothing was logged"
        assert f"a frame of version {VERSION + 1}, this is version {VERSION}" in caplog.text
        channel = Channel(TcpPipe(engine, "worker"))
        answer = channel.receive(10.0)
        assert answer is not None
        assert answer.kind is FrameKind.ERROR
        with pytest.raises(VersionError, match=f"a frame of version {VERSION + 1}, this is version {VERSION}"):
            read_header(other[:HEADER_BYTES])
    pending.close()


def test_who_comes_through_shared_memory_is_heard_and_outlasts_strangers(listener: socket.socket) -> None:
    pending, shared = PendingConnections(listener, stall_s=10), SharedFile.create()
    with connected(listener) as engine, ExitStack() as opened:
        opened.callback(pending.close)
        opened.callback(shared.unlink)
        path = torch.frombuffer(bytearray(str(shared.path).encode()), dtype=torch.uint8)
        pipe = TcpPipe(engine, "worker")
        Channel(pipe).send([Frame(kind=FrameKind.ATTACH, epoch=0, session=0, parts=(path,))])
        while not (answer := Channel(pipe).receive(0.0)):
            assert pending.completed(0.1) == []
        assert answer.kind is FrameKind.WELCOME
        for _ in range(2 * MOST):
            opened.enter_context(connected(listener))
            assert pending.completed(0.1) == []
        Channel(ShmPipe(shared, pipe, first=True)).send([PING])
        channel, frame = one_of(pending)
        assert channel.name.startswith("shm over ")
        assert frame.kind is PING.kind
        channel.close()


def test_a_connection_that_was_reset_is_forgotten(listener: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    pending = PendingConnections(listener, stall_s=10)
    other = connected(listener)
    assert pending.completed(1.0) == []
    assert len(pending) == 1
    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    other.close()  # a reset, not an orderly close
    assert pending.completed(10.0) == []
    assert len(pending) == 0
    assert "Connection reset by peer" in caplog.text


def test_without_descriptors_newcomers_wait_and_the_log_says_so_once(
    listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(socket.socket):
        left = 3

        def accept(self) -> tuple[socket.socket, Any]:
            if self.left:
                self.left -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    with Full(fileno=listener.detach()) as full, connected(full) as other:
        pending = PendingConnections(full, stall_s=10)
        other.sendall(GREETING)
        found = [pending.completed(10.0) for _ in range(4)]
        assert found[:3] == [[]] * 3
        [(channel, _)] = found[3]
        channel.close()
    assert caplog.text.count("no connection is taken: Too many open files") == 1
