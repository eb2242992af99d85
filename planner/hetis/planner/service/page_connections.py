"""How many connections the status page keeps, and for how long one may say nothing.

Every connection takes a descriptor, of which a process has a fixed number: without limits, idle ones would leave none
to gRPC and the store.
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
    """What the page grants.

    Attributes:
        of_all, of_a_peer: connections at a time, in all and of one host; one too many is closed at once.
        request_s: after how long one is closed on which no whole request has come, or none since the last answer.
        answer_s: after how long one is closed whose answer has not all been written, because nobody reads it.
    """

    of_all: int = 256
    of_a_peer: int = 64
    request_s: float = 10.0
    answer_s: float = 60.0


def limited_protocol(limits: PageLimits) -> type[asyncio.Protocol]:
    """The HTTP protocol of a page with such limits."""
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
            """Answers what is no HTTP, unless the request that it is part of has its answer or a part of that."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True  # else it answers, too, and logs why it cannot
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:
                self.transport.abort()  # what is still to be written is nobody's any more

        def on_response_complete(self) -> None:
            self._is_answering = False
            self._unwatch()
            super().on_response_complete()  # which begins to answer what was asked meanwhile
            self._go_on_watching()

        def _go_on_watching(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._answer_in_time()
            else:
                self._watch()

        def _answer_in_time(self) -> None:
            """One time for the answer, however much more is asked for meanwhile."""
            if not self._is_answering and not self.transport.is_closing():
                self._is_answering = True
                self._unwatch()
                self._timer = self.loop.call_later(limits.answer_s, self.transport.abort)

        def _watch(self) -> None:
            """Watch the time since the connection's begin or the last answer; what comes bit by bit gains no time."""
            if self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(limits.request_s, self.transport.abort)

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Protocol
