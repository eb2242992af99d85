"""Bytes over TCP: no delay, and a single system call to send, or to wait for and read, anything small.

Incoming bytes are read ahead into a buffer, so that a frame's header and body, and those of the frames behind it,
arrive together. Large bodies are read straight into place.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Sequence

from hetis.runtime.transport.errors import ChannelClosedError, ChannelStalledError

BUFFER_BYTES = 2 << 20
AHEAD_BYTES = 1 << 16  # bytes read ahead; more only from an end that writes at the same time
MOST_BUFFERS = 256  # per call; the kernel accepts 1,024
FINE_S = 0.05  # the kernel counts a read's time-out in ticks of some milliseconds, so shorter ones use poll
LONGEST_S = 1e9


class TcpPipe:
    """One end of a TCP connection."""

    def __init__(self, connection: socket.socket, name: str, *, reads_ahead: bool = False) -> None:
        """Initialise. With ``reads_ahead`` it reads while it waits to write, so two writing ends do not block each
        other.
        """
        self.name = name
        self._reads_ahead = reads_ahead
        self._ahead = memoryview(bytearray(AHEAD_BYTES))
        self._begin = self._end = 0  # bounds of the unread bytes in it
        self._socket = connection
        self._wait_s = 0.0  # the kernel's time-out for reading; 0: forever
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for which in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, which, BUFFER_BYTES)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connection, select.POLLIN)
        self._writable.register(connection, select.POLLOUT | (select.POLLIN if reads_ahead else 0))

    @classmethod
    def connect(cls, host: str, port: int, *, timeout_s: float, reads_ahead: bool = False) -> TcpPipe:
        """Connect. Raises ChannelError if nobody listens there."""
        where = f"tcp:{host}:{port}"
        try:
            connection = socket.create_connection((host, port), timeout=timeout_s)
        except OSError as error:
            raise ChannelClosedError(f"{where}: {error}") from error
        return cls(connection, where, reads_ahead=reads_ahead)

    @property
    def socket(self) -> socket.socket:
        return self._socket

    @property
    def is_local(self) -> bool:
        """Return whether both ends are on this host."""
        try:
            host: str = self._socket.getpeername()[0]
        except OSError:
            return False  # the other end is gone, as reading will show
        return host.startswith("127.") or host == "::1"

    def write(self, buffers: Sequence[memoryview], timeout_s: float) -> None:
        left = list(buffers)
        deadline_s = None
        while left:
            try:
                sent = self._socket.sendmsg(left[:MOST_BUFFERS], (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                deadline_s = deadline_s or time.monotonic() + timeout_s
                self._wait(deadline_s - time.monotonic())
                if self._reads_ahead:
                    self._read_ahead()
                continue
            except OSError as error:
                raise ChannelClosedError(f"{self.name}: {error}") from error
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def read_into(self, buffer: memoryview, timeout_s: float) -> int:
        if self._begin == self._end:
            if len(buffer) >= AHEAD_BYTES:
                return self._read(buffer, timeout_s)
            if len(self._ahead) > AHEAD_BYTES:  # it had to grow once
                self._ahead = memoryview(bytearray(AHEAD_BYTES))
            self._begin, self._end = 0, self._read(self._ahead, timeout_s)
        num = min(len(buffer), self._end - self._begin)
        buffer[:num] = self._ahead[self._begin : self._begin + num]
        self._begin += num
        return num

    def close(self) -> None:
        self._socket.close()

    def _read(self, into: memoryview, timeout_s: float) -> int:
        """Read and return the number of bytes, or 0 if none arrived in time. Handling a signal restarts the time.

        For long waits the kernel waits within the read: a separate call would cost as much as reading.
        """
        try:
            if timeout_s >= FINE_S:
                if timeout_s != self._wait_s:
                    self._set_wait(timeout_s)
                came = self._socket.recv_into(into)
            elif timeout_s <= 0 or self._readable.poll(timeout_s * 1000):
                came = self._socket.recv_into(into, 0, socket.MSG_DONTWAIT)
            else:
                return 0
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ChannelClosedError(f"{self.name}: {error}") from error
        if not came:
            raise ChannelClosedError(f"{self.name}: the other end is gone")
        return came

    def _set_wait(self, timeout_s: float) -> None:
        seconds, micros = divmod(round(min(timeout_s, LONGEST_S) * 1e6), 1_000_000)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", seconds, micros))
        self._wait_s = timeout_s

    def _read_ahead(self) -> None:
        """Read what is there, behind bytes read earlier that nobody has taken yet."""
        if len(self._ahead) - self._end < AHEAD_BYTES:
            left = self._ahead[self._begin : self._end]
            self._begin, self._end = 0, len(left)
            self._ahead = memoryview(bytearray(2 * (len(left) + AHEAD_BYTES)))
            self._ahead[: len(left)] = left
        self._end += self._read(self._ahead[self._end :], 0.0)

    def _wait(self, left_s: float) -> None:
        if left_s <= 0 or not self._writable.poll(left_s * 1000):
            raise ChannelStalledError(f"{self.name}: the other end took nothing for too long")


def listen(host: str, port: int = 0) -> socket.socket:
    """Return a socket that accepts connections; port 0 picks any free port. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)
