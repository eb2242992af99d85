"""Connections that have not spoken yet: a silent one must not hold up the engine that is served."""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable

MOST = 16  # at a time; the oldest makes room
AGAIN_S = 0.01  # after a connection that could not be accepted
_log = logging.getLogger(__name__)


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
        self._close_silent(but=ready)
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

    def _close_silent(self, *, but: set[int]) -> None:
        now_s = self._clock()
        for number in [n for n, (_, until_s) in self._silent.items() if until_s <= now_s and n not in but]:
            self._take(number).close()

    def _take(self, number: int) -> socket.socket:
        connection, _ = self._silent.pop(number)
        self._poll.unregister(number)
        return connection
