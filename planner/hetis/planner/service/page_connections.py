"""Limits on the connections of the status page and on their silence.

Every connection takes a descriptor, of which a process has a fixed number: without limits, idle ones would leave none
for gRPC and the store.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLimits:
    """The limits of the page.

    Attributes:
        of_all, of_a_peer: open connections, in total and per host; one in excess is closed at once.
        request_s: how long a connection may stay without a complete request, from its start or the last answer.
        answer_s: how long the writing of an answer may take, as its reader may be stuck.
    """

    of_all: int = 256
    of_a_peer: int = 64
    request_s: float = 10.0
    answer_s: float = 60.0


def limited_protocol(limits: PageLimits) -> type[asyncio.Protocol]:
    """Return the HTTP protocol class of a page with such limits."""
    open_by_peer = Counter[str]()

    class Protocol(H11Protocol):
        _peer = ""
        _timer: asyncio.TimerHandle | None = None
        _is_answering = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            peer = self.client[0] if self.client else ""
            if open_by_peer.total() >= limits.of_all or open_by_peer[peer] >= limits.of_a_peer:
                transport.abort()
                return
            self._peer = peer
            open_by_peer[peer] += 1
            self._watch()

        def connection_lost(self, error: Exception | None) -> None:
            if self._peer:
                open_by_peer[self._peer] -= 1
                if not open_by_peer[self._peer]:
                    del open_by_peer[self._peer]
                self._peer = ""
            self._unwatch()
            super().connection_lost(error)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._go_on_watching()

        def send_400_response(self, msg: str) -> None:
            """Answer malformed HTTP, unless the request that it belongs to has its answer or a part of it."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True  # otherwise it answers, too, and logs why it cannot
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:
                self.transport.abort()  # nobody reads what is still to be written

        def on_response_complete(self) -> None:
            self._is_answering = False
            self._unwatch()
            super().on_response_complete()  # which begins to answer pipelined requests
            self._go_on_watching()

        def _go_on_watching(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._answer_in_time()
            else:
                self._watch()

        def _answer_in_time(self) -> None:
            """Start the timer for the answer once, however many more requests arrive meanwhile."""
            if not self._is_answering and not self.transport.is_closing():
                self._is_answering = True
                self._unwatch()
                self._timer = self.loop.call_later(limits.answer_s, self.transport.abort)

        def _watch(self) -> None:
            """Start the timer from the connection's start or the last answer; requests that trickle in gain no time."""
            if self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(limits.request_s, self.transport.abort)

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Protocol
