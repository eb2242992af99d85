"""Connections that have not spoken yet: who connects and says nothing must not hold up the engine that is served."""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable

MOST = 16  # at a time; the oldest makes room
AGAIN_S = 0.01  # after a connection that could not be taken
_log = logging.getLogger(__name__)


class PendingConnections:
    """Lets connections in, and hands out those that have begun to speak."""

    def __init__(
        self, listener: socket.socket, *, silent_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """One that says nothing for ``silent_s`` is closed."""
        listener.setblocking(False)
        self._listener, self._silent_s, self._clock = listener, silent_s, clock
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._silent: dict[int, tuple[socket.socket, float]] = {}
        self._said = ""  # in the log: why no connection is taken

    def __len__(self) -> int:
        """Return how many connections are silent."""
        return len(self._silent)

    def close(self) -> None:
        """Closes all that are silent."""
        for number in list(self._silent):
            self._take(number).close()

    def speaking(self, timeout_s: float) -> socket.socket | None:
        """A connection with something to read, or whose other end has gone; waits at most ``timeout_s`` for one."""
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
            except OSError as error:  # no descriptor is left, say: later there may be one
                if str(error) != self._said:  # it is asked for again and again: once for as long as it is the same
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
