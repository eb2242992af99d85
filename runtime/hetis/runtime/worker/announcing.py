"""A worker says where it is, again and again while no engine needs it: the store goes with the engine it lives in."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable

from hetis.runtime.transport.connecting import Endpoint, open_store, publish
from hetis.runtime.transport.errors import ChannelError

_AGAIN_S, _CONNECT_S, _STORE_S = 1.0, 1.0, 2.0
_log = logging.getLogger(__name__)


class Announcer:
    """Tells one store of one worker. A store that is not there is no error: the engine may come later, or come back."""

    def __init__(self, name: str, store: tuple[str, int], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._store, self._clock = name, store, clock
        self._said: tuple[Endpoint, float] | None = None
        self._told: bool | None = None  # as the log says; None: nothing so far

    def say(self, endpoint: Endpoint) -> None:
        """Says where the worker is, unless it has said the same a moment ago."""
        now_s = self._clock()
        if self._said is None or self._said[0] != endpoint or now_s - self._said[1] >= _AGAIN_S:
            self._said = endpoint, now_s
            self._tell(endpoint)

    def _tell(self, endpoint: Endpoint) -> None:
        host, port = self._store
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            # A look first: torch's client writes a page to the log for each store that is not there.
            socket.create_connection(self._store, timeout=_CONNECT_S).close()
            publish(open_store(where, is_master=False, timeout_s=_STORE_S), self._name, endpoint)
        except (OSError, ChannelError) as error:
            if self._told is not False:
                _log.warning("%s: waits for the store at %s: %s", self._name, where, error)
            self._told = False
            return
        if not self._told:
            _log.info("%s: the store at %s knows where it is", self._name, where)
        self._told = True
