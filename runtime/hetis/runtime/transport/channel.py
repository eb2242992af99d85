"""Channels: whole frames, in order, between an engine and a worker. They are built on a pipe, which carries bytes.

A worker listens on TCP, with a key that its engine knows. The engine connects and, if both are on one host, may request
shared memory in place of the socket.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from hetis.runtime.transport.encryption import ConnectionKey, Pipe
from hetis.runtime.transport.frames import (
    HEADER_BYTES,
    MOST_BODY_BYTES,
    ChannelClosedError,
    ChannelError,
    ChannelStalledError,
    ErrorCode,
    Frame,
    FrameError,
    FrameKind,
    VersionError,
    bytes_of,
    error_answer,
    header_of,
    read_error,
    read_header,
)
from hetis.runtime.transport.pipes import SharedFile, ShmPipe, TcpPipe, is_supported

_log = logging.getLogger(__name__)


# Largest body before an engine is known. A handshake has 8 bytes for each of at most `MOST_LAYERS` layers, and few
# more.
_HANDSHAKE_BYTES = 64 * 1024
_OF_CHANNEL = (FrameKind.ATTACH, FrameKind.CHALLENGE)  # what `Handshake` answers itself, each once


class Channel:
    """One end of a connection: frames over a pipe. A frame that has begun must complete within ``stall_s``.

    Not thread-safe. After a ChannelError only `close` may be called.
    """

    def __init__(self, pipe: Pipe, *, stall_s: float = 10.0, most_body_bytes: int = MOST_BODY_BYTES) -> None:
        self.name = pipe.name  # display name: the kind and the other end
        self.own: ConnectionKey | None = None  # whose nonce a worker sent to an engine of which it knows nothing yet
        self._pipe, self._stall_s, self._most_body_bytes = pipe, stall_s, most_body_bytes
        self._header = bytearray(HEADER_BYTES)
        self._into_header = memoryview(self._header)
        self._is_closed = False

    @property
    def is_shared(self) -> bool:
        """Whether frames go through memory of this host, where nobody listens."""
        return isinstance(self._pipe, ShmPipe)

    def encrypt(self, own: ConnectionKey, end: Literal["engine", "worker"], other: bytes, key: bytes) -> None:
        """Encrypt all that follows, as both ends must do between the same two frames. See `ConnectionKey`."""
        self._pipe = own.encrypted(self._pipe, end, other, key, stall_s=self._stall_s)
        self.name = self._pipe.name

    def trust(self) -> None:
        """Take frames of any size that there is, because the other end is known."""
        self._most_body_bytes = MOST_BODY_BYTES

    def send(self, frames: Sequence[Frame]) -> None:
        """Send all frames together. Raises ChannelError."""
        self._check_open()
        buffers = []
        for frame in frames:
            buffers.append(memoryview(header_of(frame)))
            buffers += [bytes_of(part) for part in frame.parts if part.nbytes]
        self._pipe.write(buffers, self._stall_s)

    def receive(self, timeout_s: float) -> Frame | None:
        """Return the next frame, or None if none began to arrive within the time. Raises ChannelError."""
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
        """Close the connection; the other end notices. May be called again."""
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


class ChannelKind(StrEnum):
    """The carrier of the frames. ``auto``: shared memory on one host, TCP between hosts."""

    AUTO = "auto"
    SHM = "shm"
    TCP = "tcp"


def connect(host: str, port: int, kind: ChannelKind = ChannelKind.AUTO, *, stall_s: float = 10.0) -> Channel:
    """Return the engine's end of a channel to a worker.

    Raises:
        ChannelError: the worker is not reached, or the kind is not available between these two.
        OSError: this machine has no room for the shared memory, or this process has no free file descriptors.
    """
    pipe = TcpPipe.connect(host, port, timeout_s=stall_s)
    channel = Channel(pipe, stall_s=stall_s)
    try:
        return _agreed(channel, pipe, kind, stall_s=stall_s)
    except OSError:
        channel.close()
        raise


def _agreed(channel: Channel, pipe: TcpPipe, kind: ChannelKind, *, stall_s: float) -> Channel:
    """Return the channel agreed on, which is the socket's or replaces it."""
    if kind is ChannelKind.TCP or (kind is ChannelKind.AUTO and not (pipe.is_local and is_supported())):
        return channel
    if not pipe.is_local or not is_supported():
        pipe.close()
        raise ChannelError(f"{pipe.name}: shared memory needs one host, /dev/shm and x86-64")
    try:
        shared = SharedFile.create()
    except OSError as error:
        if kind is ChannelKind.SHM:
            raise
        _log.warning("%s: no shared memory: %s", pipe.name, error.strerror)
        return channel  # the socket works as well, only slower
    try:
        path = torch.frombuffer(bytearray(str(shared.path).encode()), dtype=torch.uint8)
        channel.send([Frame(kind=FrameKind.ATTACH, epoch=0, session=0, parts=(path,))])
        answer = channel.receive(stall_s)
        if answer is None:
            raise FrameError(f"{pipe.name}: the worker said nothing of the shared memory")
        refused = None if answer.kind is FrameKind.WELCOME else read_error(answer)[2]
    except BaseException:
        shared.unlink()
        channel.close()
        raise
    if refused is not None:
        shared.unlink()
        why = f"{pipe.name}: the worker does not take the shared memory: {refused}"
        if kind is ChannelKind.SHM:
            channel.close()
            raise ChannelError(why)
        _log.warning("%s", why)
        return channel
    shared.unlink()  # both ends have it open
    return Channel(ShmPipe(shared, pipe, first=True), stall_s=stall_s)


class Handshake:
    """The worker's end of a new connection, until the other end has sent its first frame that does not concern the
    channel itself.

    Nothing here waits: the other end may be anybody, and a worker has an engine to serve.
    """

    def __init__(self, connection: socket.socket, *, stall_s: float = 10.0) -> None:
        """Initialise. Raises ChannelError if the other end is gone; then the connection is closed."""
        try:
            host, port = connection.getpeername()[:2]
            self._tcp = TcpPipe(connection, f"tcp:{host}:{port}")
        except OSError as error:
            connection.close()
            raise ChannelClosedError("a connection was reset before it said anything") from error
        self._pipe: Pipe = self._tcp
        self._arriving = _Arriving(self._pipe)
        self._stall_s = stall_s
        self._answered: set[FrameKind] = set()
        self._own: ConnectionKey | None = None

    @property
    def name(self) -> str:
        return self._pipe.name

    @property
    def is_attached(self) -> bool:
        """Whether the rest comes through shared memory: the other end belongs to this user, on this host."""
        return self._pipe is not self._tcp

    def read(self) -> tuple[Channel, Frame] | None:
        """Return the channel and its first frame, or None until all of it has arrived.

        The channel takes only small frames until `Channel.trust` is called.

        Raises:
            ChannelError: what arrived is not valid, or the other end is gone; the connection is closed.
        """
        try:
            frame = self._arriving.read()
            while frame is not None and frame.kind in _OF_CHANNEL and frame.kind not in self._answered:
                self._answered.add(frame.kind)
                if frame.kind is FrameKind.ATTACH:
                    self._attach(frame)
                else:
                    self._own = ConnectionKey()
                    nonce = np.frombuffer(self._own.nonce, np.uint8)
                    Channel(self._pipe, stall_s=0.0).send([frame.answered(FrameKind.NONCE, parts=(nonce,))])
                self._arriving = _Arriving(self._pipe)
                frame = self._arriving.read()
            if frame is None and self.is_attached and self._tcp.read_into(memoryview(bytearray(1)), 0.0):
                raise FrameError(f"{self.name}: something was said beside the shared memory")
        except VersionError as error:
            with suppress(ChannelError):  # any frame of ours says our version to the other end
                refused = Frame(kind=FrameKind.HELLO, epoch=0, session=0)
                Channel(self._pipe, stall_s=0.0).send([error_answer(refused, ErrorCode.REFUSED, str(error))])
            self.close()
            raise
        except ChannelError:
            self.close()
            raise
        if frame is None:
            return None
        channel = Channel(self._pipe, stall_s=self._stall_s, most_body_bytes=_HANDSHAKE_BYTES)
        channel.own = self._own
        return channel, frame

    def close(self) -> None:
        self._pipe.close()

    def _attach(self, frame: Frame) -> None:
        """Go on over the memory that an engine offers, or over the socket if that cannot be opened."""
        if not self._tcp.is_local:
            raise FrameError(f"{self.name}: shared memory was offered from another host")
        answers = Channel(self._tcp, stall_s=0.0)
        try:
            shared = SharedFile.open(Path(bytes(frame.raw).decode(errors="replace")))
        except FrameError as error:
            answers.send([error_answer(frame, ErrorCode.REFUSED, str(error))])
        else:
            self._pipe = ShmPipe(shared, self._tcp, first=False)
            answers.send([Frame(kind=FrameKind.WELCOME, epoch=0, session=0)])


class _Arriving:
    """A small frame of which any part may have arrived."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._header = bytearray(HEADER_BYTES)
        self._left = memoryview(self._header)  # of the header, and then of the body
        self._frame: Frame | None = None  # once its header is known

    def read(self) -> Frame | None:
        """Return the frame if all of it has arrived. Raises ChannelError."""
        if self._frame is None and self._has_filled():
            self._frame, body = read_header(self._header, most_body_bytes=_HANDSHAKE_BYTES)
            self._left = body.data
        return self._frame if self._frame is not None and self._has_filled() else None

    def _has_filled(self) -> bool:
        while self._left:
            came = self._pipe.read_into(self._left, 0.0)
            if not came:
                return False
            self._left = self._left[came:]
        return True
