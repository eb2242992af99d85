"""Channels: whole frames, in order, between two ends. Most are built on a pipe, which carries bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from hetis.runtime.transport.errors import ChannelClosedError, ChannelStalledError
from hetis.runtime.transport.frames import HEADER_BYTES, MOST_BODY_BYTES, Frame, bytes_of, header_of, read_header


class Channel(Protocol):
    """One end of a connection. Not thread-safe. After a ChannelError only `close` may be called.

    Attributes:
        name: for people: the kind and the other end.
    """

    name: str

    def send(self, frames: Sequence[Frame]) -> None:
        """Send all frames, together if the channel can. Raises ChannelError."""

    def receive(self, timeout_s: float) -> Frame | None:
        """Return the next frame, or None if none began to arrive within the time. Raises ChannelError."""

    def close(self) -> None:
        """Close the connection; the other end notices. May be called again."""


class Pipe(Protocol):
    """Ordered bytes in both directions."""

    name: str

    def write(self, buffers: Sequence[memoryview], timeout_s: float) -> None:
        """Write all buffers. Raises ChannelError, after which it is unknown how much was sent."""

    def read_into(self, buffer: memoryview, timeout_s: float) -> int:
        """Fill the front of ``buffer`` and return the number of bytes, 0 after the time-out. Raises ChannelError."""

    def close(self) -> None: ...


class PipeChannel:
    """Frames over a pipe. A frame that has begun must complete within ``stall_s``; the body's length is limited."""

    def __init__(self, pipe: Pipe, *, stall_s: float = 10.0, most_body_bytes: int = MOST_BODY_BYTES) -> None:
        self.name = pipe.name
        self._pipe, self._stall_s = pipe, stall_s
        self._most_body_bytes = most_body_bytes
        self._header = bytearray(HEADER_BYTES)
        self._into_header = memoryview(self._header)
        self._is_closed = False

    def send(self, frames: Sequence[Frame]) -> None:
        self._check_open()
        buffers = []
        for frame in frames:
            buffers.append(memoryview(header_of(frame)))
            buffers += [bytes_of(part) for part in frame.parts if part.nbytes]
        self._pipe.write(buffers, self._stall_s)

    def receive(self, timeout_s: float) -> Frame | None:
        self._check_open()
        came = self._pipe.read_into(self._into_header, timeout_s)
        if not came:
            return None
        deadline_s = time.monotonic() + self._stall_s
        if came < HEADER_BYTES:
            self._fill(self._into_header[came:], deadline_s)
        frame, body = read_header(self._header, most_body_bytes=self._most_body_bytes)
        if len(body):
            self._fill(body.data, deadline_s)
        return frame

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._pipe.close()

    def _fill(self, left: memoryview, deadline_s: float) -> None:
        while left:
            came = self._pipe.read_into(left, max(deadline_s - time.monotonic(), 0.0))
            if not came:
                raise ChannelStalledError(f"{self.name}: a frame stopped {len(left)} bytes before its end")
            left = left[came:]

    def _check_open(self) -> None:
        if self._is_closed:
            raise ChannelClosedError(f"{self.name}: this end is closed")
