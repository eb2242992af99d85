"""HTTP as bytes: requests to the pages of planner and agent, and the answers of an engine to its agent."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import h11
import uvicorn

from hetis.planner.service.observability.metrics import ServiceMetrics
from hetis.planner.service.status_page import PageLimits, limited_protocol, page_config, status_app
from hetis.runtime.agent.metrics import LOOPBACK, AgentMetrics
from hetis.runtime.agent.pressure import Scrape, ScrapeState, scrape
from tests.planner.service.fakes import FakePlanner

_HOSTS = ("planner.example",)
_ANSWER_S = 5.0
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


class _Transport(asyncio.Transport):
    """A connection whose other side has sent everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self._is_closing = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 40_000), "sockname": ("127.0.0.1", 8471)}.get(name, default)

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True

    abort = close

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        raise AssertionError(f"the page gave a connection to {type(protocol).__name__}, which has no limits")


class _Errors(logging.Handler):
    """Collects failures that a server logs, which no input should cause."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []
        log = logging.getLogger("uvicorn.error")
        log.propagate = False
        log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@cache
def _errors() -> _Errors:
    return _Errors()


@cache
def _page() -> tuple[asyncio.AbstractEventLoop, uvicorn.Config, type[Any]]:
    app = status_app(FakePlanner(), ServiceMetrics("1"), version="1", is_ready=lambda: True, hosts=_HOSTS)
    limits = PageLimits()
    config = page_config(app, limits)
    config.load()
    return asyncio.new_event_loop(), config, limited_protocol(limits)


def ask_page(data: bytes) -> None:
    """Send bytes to the status page, which must answer in order and neither report nor log a failure."""
    loop, config, protocol = _page()
    errors = _errors()
    errors.records.clear()

    async def talk() -> bytes:
        state = uvicorn.server.ServerState()
        connection = protocol(config=config, server_state=state, app_state={})
        transport = _Transport()
        connection.connection_made(transport)
        half = len(data) // 2  # requests arrive in pieces
        for piece in (data[:half], data[half:]):
            if piece and not transport.is_closing():
                connection.data_received(piece)
                while state.tasks:
                    await asyncio.gather(*state.tasks)
        connection.connection_lost(None)
        return bytes(transport.written)

    written = loop.run_until_complete(talk())
    statuses = [int(found) for found in _STATUS.findall(written)]
    assert not written or statuses, f"no answer of HTTP: {written[:80]!r}"
    assert all(status < 500 for status in statuses), f"the page failed: {written[:400]!r}"
    assert not errors.records, f"the page failed: {errors.records[0].exc_info or errors.records[0].getMessage()}"
    host = _first_host(data)
    if host is not None and not _is_ours(host):
        assert statuses[:1] != [200], f"the page was shown to whoever asks {host!r}"


def _first_host(data: bytes) -> str | None:
    """Return the Host of the first request, or None if it is incomplete or has none."""
    reader = h11.Connection(h11.SERVER)
    try:
        reader.receive_data(data)
        request = reader.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(request, h11.Request):
        return None
    return next((value.decode("latin-1") for name, value in request.headers if name == b"host"), None)


def _is_ours(host: str) -> bool:
    """Return whether a host is ours, by an oracle: addresses, this machine's names, and the configured ones."""
    name = re.sub(r":[^\]]*$", "", host) if not host.startswith("[") else host[1 : host.rfind("]")]
    if name.lower() in {"", "localhost", socket.gethostname().lower(), socket.getfqdn().lower(), *_HOSTS}:
        return True
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


@cache
def _agent_port() -> int:
    return AgentMetrics(version="1").serve(0)


def ask_agent(data: bytes) -> None:
    """Send bytes to an agent's metrics, which may answer or not, but must answer the next request."""
    port = _agent_port()
    answer = _talk(port, data)
    status = _STATUS.match(answer)
    assert status is None or int(status[1]) != 500, f"it failed: {answer[:400]!r}"
    assert _talk(port, b"GET /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200 ")


def _talk(port: int, data: bytes) -> bytes:
    with socket.create_connection((LOOPBACK, port), timeout=_ANSWER_S) as connection:
        answer = bytearray()
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(1 << 16):
                answer += piece
        return bytes(answer)


class _Engine:
    """Answers every request with the same bytes."""

    def __init__(self) -> None:
        self.answer = b""
        self._listening = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        for connection in self._connections():
            with connection, contextlib.suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(self.answer)
                connection.shutdown(socket.SHUT_WR)

    def _connections(self) -> Iterator[socket.socket]:
        while True:
            yield self._listening.accept()[0]


@cache
def _engine() -> _Engine:
    return _Engine()


def read_engine(data: bytes) -> None:
    """Read bytes as an engine's answer: metrics, or a state that explains why there are none."""
    engine = _engine()
    engine.answer = data
    found: Scrape = scrape(f"http://{LOOPBACK}:{engine.port}/metrics", timeout_s=_ANSWER_S)
    assert (found.state is ScrapeState.READ) == bool(found.readings)
    assert found.message or found.state is ScrapeState.READ
