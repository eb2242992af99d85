"""Both ends in one process and one thread: an end that waits runs the other one, and tests see every byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hetis.runtime.transport.frames import ChannelClosedError


class InprocPipe:
    """One end; `pair` makes both.

    Attributes:
        idle: called when this end waits and nothing has arrived; runs the other end.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.idle: Callable[[], None] | None = None
        self.is_closed = False
        self._arrived = bytearray()
        self._peer: InprocPipe | None = None

    @classmethod
    def pair(cls, name: str = "inproc") -> tuple[InprocPipe, InprocPipe]:
        one, other = cls(f"{name}:a"), cls(f"{name}:b")
        one._peer, other._peer = other, one
        return one, other

    def write(self, buffers: Sequence[memoryview], timeout_s: float) -> None:
        peer = self._peer
        if peer is None or peer.is_closed or self.is_closed:
            raise ChannelClosedError(f"{self.name}: the other end is closed")
        for buffer in buffers:
            peer._arrived += buffer

    def read_into(self, buffer: memoryview, timeout_s: float) -> int:
        if not self._arrived and self.idle is not None:
            self.idle()
        came = min(len(buffer), len(self._arrived))
        if not came and self._peer is not None and self._peer.is_closed:
            raise ChannelClosedError(f"{self.name}: the other end is closed")
        buffer[:came] = self._arrived[:came]
        del self._arrived[:came]
        return came

    def close(self) -> None:
        self.is_closed = True
