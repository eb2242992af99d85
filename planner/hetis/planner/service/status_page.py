"""The read-only page with the planner's state: for browsers and curl, for Prometheus, and for probes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hetis.commands.endpoints import is_ip, joined
from hetis.planner.failures import ServiceError
from hetis.planner.report.page.rendering import live_script_policy
from hetis.planner.service.observability.metrics import CONTENT_TYPE, ServiceMetrics
from hetis.planner.service.server import AddressError
from hetis.planner.service.settings import split_address

if TYPE_CHECKING:
    from hetis.planner.service.observability.overview import Overview
    from hetis.planner.service.succession import Succession


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLimits:
    """The limits on connections to the page.

    Attributes:
        of_all, of_a_peer: open connections, in total and per host; any more are closed at once.
    """

    of_all: int = 256
    of_a_peer: int = 64
    # Time for a complete request to arrive, from the start of the connection or the last answer
    request_s: float = 10.0
    answer_s: float = 60.0  # time for sending an answer, whose reader may be stuck


def limited_protocol(limits: PageLimits) -> type[asyncio.Protocol]:
    """Return the HTTP protocol class for a page with these limits."""
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
            """Answer malformed HTTP, unless an answer to the same request was already sent or begun."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True  # otherwise the cycle would answer, too, and log why it cannot
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:
                self.transport.abort()  # nothing that is still to be written will be read

        def on_response_complete(self) -> None:
            self._is_answering = False
            self._unwatch()
            super().on_response_complete()  # which starts to answer pipelined requests
            self._go_on_watching()

        def _go_on_watching(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._answer_in_time()
            else:
                self._watch()

        def _answer_in_time(self) -> None:
            """Start the timer for an answer only once, however many more requests arrive in the meantime."""
            if not self._is_answering and not self.transport.is_closing():
                self._is_answering = True
                self._unwatch()
                self._timer = self.loop.call_later(limits.answer_s, self.transport.abort)

        def _watch(self) -> None:
            """Start the timer at the start or after an answer; requests that trickle in gain no time."""
            if self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(limits.request_s, self.transport.abort)

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Protocol


T = TypeVar("T")
FRESH_S = 1.0


class Recent(Generic[T]):
    """Answers by key that are costly to make and may be a second old. Belongs to one event loop.

    However many ask, each is made once, and one at a time. It counts as new from when it was finished: whatever it
    takes to make one, the loop does other work as well.
    """

    def __init__(self, *, fresh_s: float = FRESH_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._fresh_s, self._clock = fresh_s, clock
        self._made = asyncio.Lock()
        self._kept: dict[Hashable, tuple[float, T]] = {}  # with the times at which they were finished

    async def of(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """Return the answer for ``key``, made now unless one was made less than a second ago."""
        if (found := self._fresh(key)) is not None:
            return found[1]
        async with self._made:
            if (found := self._fresh(key)) is not None:  # made while this one waited
                return found[1]
            answer = await make()
            now_s = self._clock()
            self._kept = {one: kept for one, kept in self._kept.items() if now_s < kept[0] + self._fresh_s}
            self._kept[key] = now_s, answer
            return answer

    def _fresh(self, key: Hashable) -> tuple[float, T] | None:
        kept = self._kept.get(key)
        return kept if kept is not None and self._clock() < kept[0] + self._fresh_s else None


_GRACE_S = 1
_VARIES = {"Vary": "Accept"}
# Browsers may only show the page and poll this server; the page's own policy is even stricter.
_PAGE_HEADERS = {
    **_VARIES,
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    f"script-src {live_script_policy()}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def status_app(
    source: Succession,
    metrics: ServiceMetrics,
    *,
    version: str,
    is_ready: Callable[[], bool],
    failures: Callable[[], Sequence[str]] = tuple,
    hosts: Sequence[str] = (),
    fresh_s: float = FRESH_S,
) -> Starlette:
    """Return the app with the page's routes. All are GET and change nothing.

    Args:
        failures: returns what has failed permanently, so that the process should be restarted.
        hosts: host names that requests may use besides addresses, `localhost` and this machine's own name.
        fresh_s: for how long an answer may be repeated.
    """

    recent = Recent[Response](fresh_s=fresh_s)  # its callers need no credentials, and must not stall the planner

    async def drawn(only: str) -> Response:
        from hetis.planner.service.observability.status_html import (
            status_html,  # late: wrong settings are reported first
        )

        found = source.clusters_now(only)
        if only and not found:
            return PlainTextResponse(f"this planner does not lead {only}\n", status_code=404)
        overview, ready = await source.overview(), is_ready()
        # In a thread, so that the loop is not stalled; nothing that it reads is changed any more.
        html = await asyncio.to_thread(status_html, overview, found, version=version, is_ready=ready, only=only)
        return HTMLResponse(html, headers=_PAGE_HEADERS)

    async def listed() -> Response:
        data = overview_data(await source.overview(), version=version, is_ready=is_ready())
        return JSONResponse(data, headers=_VARIES)

    async def detailed(name: str) -> Response:
        try:
            details = await source.cluster_details(name)
        except ServiceError as error:
            return JSONResponse({"error": str(error)}, status_code=503)
        if details is None:
            return JSONResponse({"error": f"{name} does not exist"}, status_code=404)
        return JSONResponse(dict(details), headers=_VARIES)

    async def measured() -> Response:
        metrics.show(await source.overview())
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    def key(kind: str, name: str = "") -> Hashable:
        """Return the key of an answer. A change of the planner's role shows at once."""
        return kind, name, source.leads, is_ready()

    async def page(request: Request) -> Response:
        name = f"clusters/{request.path_params['cluster']}" if request.path_params else ""
        if "text/html" in request.headers.get("accept", ""):  # as browsers do; curl and JSON clients accept anything
            return await recent.of(key("page", name), partial(drawn, name))
        return await recent.of(key("json", name), partial(detailed, name) if name else listed)

    async def show_metrics(_request: Request) -> Response:
        return await recent.of(key("metrics"), measured)

    async def alive(_request: Request) -> Response:
        if failed := failures():
            return PlainTextResponse(f"failed: {', '.join(failed)}; restart the planner\n", status_code=503)
        return PlainTextResponse("alive\n")

    async def ready(_request: Request) -> Response:
        return PlainTextResponse("ready\n") if is_ready() else PlainTextResponse("not ready\n", status_code=503)

    async def leads(_request: Request) -> Response:
        if source.leads and is_ready():
            return PlainTextResponse("leads\n")
        return PlainTextResponse("does not lead\n", status_code=503)

    return Starlette(
        routes=[
            Route("/", page, methods=["GET"]),
            Route("/clusters/{cluster}", page, methods=["GET"]),
            Route("/metrics", show_metrics, methods=["GET"]),
            Route("/healthz", alive, methods=["GET"]),
            Route("/readyz", ready, methods=["GET"]),
            Route("/leaderz", leads, methods=["GET"]),
        ],
        middleware=[Middleware(_KnownHosts, hosts=hosts)],
    )


def page_config(app: Starlette, limits: PageLimits) -> uvicorn.Config:
    """Return uvicorn's configuration for the page."""
    return uvicorn.Config(
        app,
        http=limited_protocol(limits),
        ws="none",  # otherwise any installed library would take over connections, bypassing the limits
        proxy_headers=False,  # no client may claim to be a proxy
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
    )


class _KnownHosts:
    """Refuses requests for other hosts.

    A browser that was tricked into taking a stranger's name for this machine (DNS rebinding) would give the stranger's
    scripts access to the page; but its requests contain that name.
    """

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str]) -> None:
        self._app = app
        self._names = {name.lower() for name in ("localhost", socket.gethostname(), socket.getfqdn(), *hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("host", "") if scope["type"] == "http" else ""
        if not given or self._knows(given):  # HTTP 1.0 names no host; browsers always do
            await self._app(scope, receive, send)
            return
        name = given if given.isprintable() else "?"
        text = f"unknown host {name[:200]}: add it to status_page.hosts\n"
        await PlainTextResponse(text, status_code=421)(scope, receive, send)

    def _knows(self, given: str) -> bool:
        host = given.rpartition("]")[0].removeprefix("[") if given.startswith("[") else given.partition(":")[0]
        return host.lower() in self._names or is_ip(host)


def overview_data(overview: Overview, *, version: str, is_ready: bool) -> dict[str, Any]:
    """Return the first page as JSON values."""
    return {
        "planner": {
            "version": version,
            "ready": is_ready,
            "role": "leader" if overview.leads else "standby",
            "leader": overview.leader,
            "epoch": overview.epoch,
            "leader_since": _moment(overview.leader_since_s),
            "lease_age_s": round(overview.lease_age_s, 3),
        },
        "store": {
            "answered_s_ago": round(overview.store_answered_s_ago, 3),
            "counted_s_ago": round(overview.counted_s_ago, 3),
        },
        "clusters": [
            {
                "name": cluster.name,
                "active_plan": cluster.active_plan,
                "activation": cluster.activation,
                "nodes": dict(cluster.num_nodes),
                "replicas": dict(cluster.num_replicas),
            }
            for cluster in overview.clusters
        ],
        "plans": dict(overview.num_plans),
        "solver": {"processes": overview.solver_processes, "searching": overview.searching, "queued": overview.queued},
    }


def _moment(time_s: float) -> str | None:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds") if time_s else None


class StatusPage:
    """The page, served in this event loop."""

    def __init__(self, limits: PageLimits | None = None) -> None:
        self._limits = limits or PageLimits()
        self._socket: socket.socket | None = None
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    def listen(self, address: str) -> str:
        """Bind an address and return it with the port chosen for 0. Raises AddressError if it cannot be used."""
        host, port = split_address(address)
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.socket(family, kind, protocol)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(where)
        except OSError as error:
            self.abandon()
            raise AddressError(f"cannot listen on {address}: {(error.strerror or str(error)).lower()}") from None
        return joined(host, self._socket.getsockname()[1])

    async def start(self, app: Starlette) -> None:
        """Start to answer with an app made by `status_app`."""
        assert self._socket is not None
        self._server = _Server(page_config(app, self._limits))
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.005)  # uvicorn sets only a flag

    async def stop(self) -> None:
        """Finish the running requests, for at most a second."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        self.abandon()

    def abandon(self) -> None:
        """Release the address if the page was not started."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class _Server(uvicorn.Server):
    """A server that leaves signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
