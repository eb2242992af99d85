"""Bytes over TCP: no delay, one system call per message where the kernel takes it whole, read straight into place."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

from hetis.runtime.transport.errors import ChannelClosedError, ChannelStalledError

BUFFER_BYTES = 2 << 20
MOST_BUFFERS = 256  # of one call; the kernel takes 1,024


class TcpPipe:
    """One end of a TCP connection."""

    def __init__(self, connection: socket.socket, name: str, *, reads_ahead: bool = False) -> None:
        """``reads_ahead``: it reads while it waits to write, so that two ends that write do not wait for each other."""
        self.name = name
        self._reads_ahead, self._ahead = reads_ahead, bytearray()
        self._socket = connection
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for which in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, which, BUFFER_BYTES)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connection, select.POLLIN)
        self._writable.register(connection, select.POLLOUT | (select.POLLIN if reads_ahead else 0))

    @classmethod
    def connect(cls, host: str, port: int, *, timeout_s: float, reads_ahead: bool = False) -> TcpPipe:
        """Raises ChannelError: nobody listens there."""
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
        """Both ends are on this host."""
        try:
            host: str = self._socket.getpeername()[0]
        except OSError:
            return False  # the other end is gone, which reading tells
        return host.startswith("127.") or host == "::1"

    def write(self, buffers: Sequence[memoryview], timeout_s: float) -> None:
        left = list(buffers)
        deadline_s = None
        while left:
            try:
                sent = self._socket.sendmsg(left[:MOST_BUFFERS])
            except BlockingIOError:
                deadline_s = deadline_s or time.monotonic() + timeout_s
                self._wait(self._writable, deadline_s - time.monotonic())
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
        if self._ahead:
            num = min(len(buffer), len(self._ahead))
            buffer[:num] = self._ahead[:num]
            del self._ahead[:num]
            return num
        try:
            came = self._try_read(buffer)
            if came is None and self._readable.poll(max(timeout_s, 0.0) * 1000):
                came = self._try_read(buffer)
        except OSError as error:
            raise ChannelClosedError(f"{self.name}: {error}") from error
        if came == 0:
            raise ChannelClosedError(f"{self.name}: the other end is gone")
        return came or 0

    def close(self) -> None:
        self._socket.close()

    def _try_read(self, buffer: memoryview) -> int | None:
        try:
            return self._socket.recv_into(buffer)
        except BlockingIOError:
            return None

    def _read_ahead(self) -> None:
        try:
            came = self._socket.recv(BUFFER_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelClosedError(f"{self.name}: {error}") from error
        if not came:
            raise ChannelClosedError(f"{self.name}: the other end is gone")
        self._ahead += came

    def _wait(self, poll: select.poll, left_s: float) -> None:
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise ChannelStalledError(f"{self.name}: the other end took nothing for too long")


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket that takes connections; port 0 chooses one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)
