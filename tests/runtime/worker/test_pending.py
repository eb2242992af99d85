"""Silent connections delay no engine, and are closed in time."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from hetis.runtime.transport.channel import accept
from hetis.runtime.transport.frames import ChannelClosedError
from hetis.runtime.worker.core import MOST, PendingConnections


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


def test_who_speaks_is_handed_out_before_those_that_came_earlier_and_are_silent(listener: socket.socket) -> None:
    pending = PendingConnections(listener, silent_s=10)
    with connected(listener) as silent, connected(listener) as speaking:
        assert pending.speaking(0.0) is None
        speaking.sendall(b"x")
        found = pending.speaking(10.0)
        assert found is not None
        with found:
            assert found.getpeername() == speaking.getsockname()
        assert pending.speaking(0.0) is None
        silent.sendall(b"y")
        later = pending.speaking(10.0)
        assert later is not None
        with later:
            assert later.getpeername() == silent.getsockname()


def test_who_says_nothing_is_closed_in_time(listener: socket.socket) -> None:
    clock = Clock()
    pending = PendingConnections(listener, silent_s=10, clock=clock)
    with connected(listener) as silent:
        assert pending.speaking(1.0) is None
        clock.now_s = 9.9
        assert pending.speaking(0.0) is None
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.recv(1)
        clock.now_s = 10.0
        assert pending.speaking(0.0) is None
        silent.settimeout(10)
        assert silent.recv(1) == b""


def test_the_oldest_of_too_many_makes_room(listener: socket.socket) -> None:
    pending = PendingConnections(listener, silent_s=10)
    with ExitStack() as opened:
        opened.callback(pending.close)
        first, *others = [opened.enter_context(connected(listener)) for _ in range(MOST + 1)]
        while pending.speaking(0.1) is None and len(pending) < MOST:
            pass
        first.settimeout(10)
        assert first.recv(1) == b""
        others[-1].sendall(b"x")
        found = pending.speaking(10.0)
        assert found is not None
        with found:
            assert found.getpeername() == others[-1].getsockname()


def test_a_connection_that_was_reset_is_told_as_closed(listener: socket.socket) -> None:
    pending = PendingConnections(listener, silent_s=10)
    other = connected(listener)
    assert pending.speaking(1.0) is None
    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    other.close()  # a reset, not an orderly close
    found = pending.speaking(10.0)
    assert found is not None
    with pytest.raises(ChannelClosedError):
        accept(found, stall_s=1.0)


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
        pending = PendingConnections(full, silent_s=10)
        other.sendall(b"x")
        found = [pending.speaking(10.0) for _ in range(4)]
        assert found[:3] == [None] * 3
        assert found[3] is not None
        found[3].close()
    assert caplog.text.count("no connection is taken: Too many open files") == 1
