"""The process around a worker's core: it listens, serves one engine at a time, and lets a newer one take over."""

from __future__ import annotations

import logging
import socket
from typing import Protocol

from hetis.runtime.transport.channel import Channel
from hetis.runtime.transport.connecting import accept
from hetis.runtime.transport.errors import ChannelError
from hetis.runtime.transport.frames import Frame, FrameKind
from hetis.runtime.transport.messages import ErrorCode
from hetis.runtime.worker.pending import PendingConnections

LOOK_S = 0.1  # between two checks for another engine while this one is silent
IDLE_S = 1.0  # between two checks while there is none
GREETING_S = 1.0  # for the rest of a greeting that has begun, while an engine is served
_log = logging.getLogger(__name__)


class Core(Protocol):
    """The core that a loop runs: an attention worker's."""

    name: str
    epoch: int

    def handle(self, frame: Frame) -> Frame | None:
        """Do what one frame asks, and return the answer if its kind has one. Raises FrameError."""

    def leave(self) -> None:
        """Handle the end of the connection."""


class WorkerLoop:
    """Runs a core over the connections that arrive at ``listener``. Each begins with a HELLO."""

    def __init__(self, core: Core, listener: socket.socket, *, stall_s: float = 10.0) -> None:
        self.core = core
        self._pending = PendingConnections(listener, silent_s=stall_s)
        self._stall_s = stall_s
        self._channel: Channel | None = None

    def run(self) -> None:
        """Serve until the process is ended."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Handle one frame or one connection, or wait briefly."""
        if self._channel is None:
            self._take_newcomer(IDLE_S, self._stall_s)
            return
        try:
            frame = self._channel.receive(LOOK_S)
            if frame is None:
                self._take_newcomer(0.0, GREETING_S)
            elif frame.kind is FrameKind.BYE:
                self._leave("it said goodbye")
            else:
                self._answer(self._channel, frame)
        except ChannelError as error:
            self._leave(str(error))

    def _take_newcomer(self, wait_s: float, stall_s: float) -> None:
        """Listen to another engine while this one is silent. It is obeyed if its key is right and its epoch not old."""
        connection = self._pending.speaking(wait_s)
        if connection is None:
            return
        try:
            channel, hello = accept(connection, stall_s=stall_s)
        except ChannelError as error:
            self._refused("a connection came to nothing", error)
            return
        try:
            answer = self.core.handle(hello) if hello.kind is FrameKind.HELLO else None
            if answer is None:
                channel.close()
                return
            channel.send([answer])
        except ChannelError as error:
            self._refused("a connection came to nothing", error)
            channel.close()
            return
        if answer.kind is FrameKind.ERROR:
            self._refused("refused an engine", ErrorCode(answer.counts[0]).name)
            channel.close()
            return
        if self._channel is not None:
            self._channel.close()
        self._channel = channel
        _log.info("%s: serves %s, epoch %d", self.core.name, channel.name, self.core.epoch)

    def _answer(self, channel: Channel, frame: Frame) -> None:
        answer = self.core.handle(frame)
        if answer is not None:
            channel.send([answer])

    def _leave(self, why: str) -> None:
        assert self._channel is not None, "there was a connection"
        _log.info("%s: %s ended: %s", self.core.name, self._channel.name, why)
        self._channel.close()
        self._channel = None
        self.core.leave()

    def _refused(self, what: str, why: object) -> None:
        _log.warning("%s: %s: %s", self.core.name, what, why)
