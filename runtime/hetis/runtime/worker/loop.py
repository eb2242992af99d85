"""The process around a worker's core: it listens, serves one engine at a time, and lets a newer one take over.

A connection that has not spoken yet must not hold up the engine that is served.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable

from hetis.runtime.transport.channel import Channel, accept
from hetis.runtime.transport.frames import ChannelError, ErrorCode, FrameKind
from hetis.runtime.worker.core import WorkerCore

MOST = 16  # at a time; the oldest makes room
AGAIN_S = 0.01  # after a connection that could not be accepted
_log = logging.getLogger(__name__)
LOOK_S = 0.1  # between two checks for another engine while this one is silent
IDLE_S = 1.0  # between two checks while there is none
GREETING_S = 1.0  # for the rest of a greeting that has begun, while an engine is served


class PendingConnections:
    """Accepts connections, and returns those that have begun to speak."""

    def __init__(
        self, listener: socket.socket, *, silent_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Initialise. A connection that is silent for ``silent_s`` is closed."""
        listener.setblocking(False)
        self._listener, self._silent_s, self._clock = listener, silent_s, clock
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._silent: dict[int, tuple[socket.socket, float]] = {}
        self._said = ""  # last logged reason why no connection is accepted

    def __len__(self) -> int:
        """Return the number of silent connections."""
        return len(self._silent)

    def close(self) -> None:
        """Close all silent connections."""
        for number in list(self._silent):
            self._take(number).close()

    def speaking(self, timeout_s: float) -> socket.socket | None:
        """Return a connection with something to read, or whose other end has gone, within at most ``timeout_s``."""
        ready = {number for number, _ in self._poll.poll(timeout_s * 1000)}
        if self._listener.fileno() in ready:
            self._let_in()
            ready |= {number for number, _ in self._poll.poll(0)}
        now_s = self._clock()
        for silent in [n for n, (_, until_s) in self._silent.items() if until_s <= now_s and n not in ready]:
            self._take(silent).close()
        number = next((number for number in self._silent if number in ready), None)
        return None if number is None else self._take(number)

    def _let_in(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no free file descriptor, for example: there may be one later
                if str(error) != self._said:  # log once while the reason stays the same: the attempt is repeated often
                    self._said = str(error)
                    _log.warning("no connection is taken: %s", error.strerror or error)
                time.sleep(AGAIN_S)
                return
            self._said = ""
            if len(self._silent) == MOST:
                self._take(next(iter(self._silent))).close()
            self._silent[connection.fileno()] = connection, self._clock() + self._silent_s
            self._poll.register(connection, select.POLLIN)

    def _take(self, number: int) -> socket.socket:
        connection, _ = self._silent.pop(number)
        self._poll.unregister(number)
        return connection


class WorkerLoop:
    """Runs a core over the connections that arrive at ``listener``. Each begins with a HELLO."""

    def __init__(self, core: WorkerCore, listener: socket.socket, *, stall_s: float = 10.0) -> None:
        self.core, self._stall_s = core, stall_s
        self._pending = PendingConnections(listener, silent_s=stall_s)
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
            elif (answer := self.core.handle(frame)) is not None:
                self._channel.send([answer])
        except ChannelError as error:
            self._leave(str(error))

    def _take_newcomer(self, wait_s: float, stall_s: float) -> None:
        """Listen to another engine while this one is silent. It is obeyed if its key is right and its epoch not old."""
        connection = self._pending.speaking(wait_s)
        if connection is None:
            return
        channel = None
        try:
            channel, hello = accept(connection, stall_s=stall_s)
            answer = self.core.handle(hello) if hello.kind is FrameKind.HELLO else None
            if answer is not None:
                channel.send([answer])
        except ChannelError as error:
            _log.warning("%s: a connection came to nothing: %s", self.core.name, error)
            if channel is not None:
                channel.close()
            return
        if answer is None or answer.kind is FrameKind.ERROR:
            if answer is not None:
                _log.warning("%s: refused an engine: %s", self.core.name, ErrorCode(answer.counts[0]).name)
            channel.close()
            return
        if self._channel is not None:
            self._channel.close()
        self._channel = channel
        _log.info("%s: serves %s, epoch %d", self.core.name, channel.name, self.core.epoch)

    def _leave(self, why: str) -> None:
        assert self._channel is not None, "there was a connection"
        _log.info("%s: %s ended: %s", self.core.name, self._channel.name, why)
        self._channel.close()
        self._channel = None
        self.core.leave()
