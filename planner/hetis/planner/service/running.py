"""The life of the process: the order in which its parts are started, and stopped in reverse."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from hetis.commands.x509 import ends_of_certificates, is_for_host, names_of_certificate
from hetis.formats.errors import DocumentError, Problem, attempt
from hetis.formats.files import read_text
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.service.calls import Calls
from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.planner.service.identity.certificates import (
    Certificates,
    Reloaded,
    keep_fresh,
)
from hetis.planner.service.identity.credentials import Authenticator, Credentials, NoCredentials, Tokens
from hetis.planner.service.limits import ConnectionLimits, ConnectionWatch, WriteRates, ports_of, reserved_for_page
from hetis.planner.service.loops import Loops
from hetis.planner.service.observability.metrics import ServiceMetrics
from hetis.planner.service.observability.telemetry import Telemetry
from hetis.planner.service.server import PlannerServer
from hetis.planner.service.settings import OFF, PlannerConfig, is_socket_path, split_address, without_password
from hetis.planner.service.status_page import PageLimits, StatusPage, status_app

if TYPE_CHECKING:
    from hetis.planner.service.succession import Succession

_log = logging.getLogger("hetis.planner")


OpenPlanner = Callable[[PlannerConfig], "Awaitable[Succession]"]


class Access:
    """Certificates and tokens, reloaded when they change. Raises DocumentError with every problem of their files."""

    def __init__(self, config: PlannerConfig) -> None:
        self._config = config
        tls, path, problems = config.tls, config.tokens, list[Problem]()
        self.certificates = None if tls is None else attempt(partial(Certificates, tls), problems)
        read = None if path is None else partial(Reloaded, "tokens", [path], partial(Tokens.load, path))
        self.tokens = None if read is None else attempt(read, problems)
        if problems:
            raise DocumentError(problems)

    @property
    def warnings(self) -> list[str]:
        return self.certificates.warnings if self.certificates is not None else []

    @property
    def refreshed(self) -> list[Reloaded[Any]]:
        files = None if self.certificates is None else self.certificates.files
        return [found for found in (files, self.tokens) if found is not None]

    def authenticator(self, clock: Callable[[], float]) -> Authenticator:
        if not self._config.requires_credentials:
            return NoCredentials()
        tls, tokens = self._config.tls, self.tokens
        return Credentials(
            tokens=(lambda: tokens.value) if tokens is not None else None,
            trust_domain=tls.trust_domain if tls is not None and tls.client_ca is not None else None,
            clock=clock,
        )


def problems_of_access(config: PlannerConfig) -> Sequence[Problem]:
    """Return the problems of the certificate and token files."""
    problems = list[Problem]()
    attempt(lambda: Access(config), problems)
    return problems


def problems_of_names(config: PlannerConfig) -> Sequence[Problem]:
    """Return the advertised addresses for which the certificate is not: clients that are sent there would refuse it.

    A planner starts in spite of them, since clients that have a better address never need the advertised one.
    """
    tls = config.tls
    if tls is None:
        return ()
    pem = attempt(partial(read_text, tls.certificate), []) or ""
    if not ends_of_certificates(pem):
        return ()  # reported by `problems_of_access`
    names = names_of_certificate(pem)
    hosts = [split_address(one)[0] for one in config.leadership.advertise if not is_socket_path(one)]
    return [
        Problem(
            file=tls.certificate,
            message=f"is not for {host}, which leadership.advertise names: clients that are sent there would refuse it;"
            f" it is for {', '.join(names) or 'no host'}",
        )
        for host in dict.fromkeys(hosts)
        if not is_for_host(names, host)
    ]


async def run_planner(
    config: PlannerConfig, open_planner: OpenPlanner, *, version: str, descriptors: int, ready_json: bool
) -> None:
    """Serve until a signal requests the end. ``descriptors``: the limit on open files.

    Raises:
        DocumentError: a certificate or the token file cannot be used.
        AddressError: the planner cannot listen on an address.
        ServiceError: the store cannot be opened, or another planner leads.
    """
    signals = StopSignals()
    page_limits = PageLimits(of_all=reserved_for_page(descriptors))
    limits = ConnectionLimits.of_descriptors(descriptors, of_a_host=config.connections.per_host)
    access = Access(config)
    for warning in (*access.warnings, *map(str, problems_of_names(config))):
        _log.warning(warning)
    metrics = ServiceMetrics(version)
    async with AsyncExitStack() as stack:
        stack.callback(signals.close)
        writes = WriteRates(per_s=config.writes.per_second, burst=config.writes.burst)
        calls = Calls(access.authenticator(time.time), Telemetry(metrics), writes=writes)
        credentials = access.certificates.credentials if access.certificates is not None else None
        server = PlannerServer((), calls, credentials=credentials, max_connections=limits.of_all)
        stack.push_async_callback(server.stop_at_once)
        # Listen before the store is opened: a planner that cannot listen must not take the lead from one that can.
        addresses = [server.listen(address) for address in config.listen]
        connections = ConnectionWatch(limits, ports_of(addresses), on_closed=metrics.connections_closed.inc)
        page, page_address = StatusPage(page_limits), ""
        if config.status_page.address != OFF:
            page_address = page.listen(config.status_page.address)
            stack.callback(page.abandon)
        planner = await _opened(signals, open_planner(config.reached_at(addresses)))
        if planner is None:
            _log.info("stopped before the store was open")
            return
        loops = Loops(planner.loops)
        calls.answer_for(
            require_leader=planner.require_leader, on_refusal=planner.note_refusal, until_begun=planner.until_begun
        )
        planner.on_loss(calls.end_streams)
        stack.push_async_callback(planner.close)
        for collector in planner.collectors:
            metrics.registry.register(collector)
        server.add(planner.servicings)
        stack.push_async_callback(server.stop_at_once)  # again, so that this happens before the planner closes
        if page_address:
            app = status_app(
                planner,
                metrics,
                version=version,
                is_ready=lambda: planner.is_ready and not calls.is_draining,
                failures=lambda: loops.failures,
                hosts=config.status_page.hosts,
            )
            stack.push_async_callback(page.stop)
            await page.start(app)
        await server.start()
        _leave_to_collector_what_is_new()
        tokens = access.tokens

        def look_at_credentials() -> None:
            calls.end_revoked_streams()
            metrics.credentials_read(
                tokens_s=tokens.value.expiries_s if tokens is not None else (),
                certificates_s=access.certificates.expiries_s if access.certificates is not None else {},
                now_s=time.time(),
            )

        look_at_credentials()
        metrics.failed_loops.set_function(lambda: len(loops.failures))
        stack.push_async_callback(loops.stop)
        loops.start("reloading files", keep_fresh(access.refreshed, config.reload, then=look_at_credentials))
        loops.start("counting connections", connections.run())
        loops.start("watching the event loop", metrics.watch_loop())
        if config.backups is not None:
            loops.start("watching backups", metrics.watch_backups(config.backups, config.reload))
        failing = asyncio.create_task(show_failure(loops, server))
        stack.callback(failing.cancel)
        _say_ready(addresses, page_address, config, as_json=ready_json)
        end = await _until_the_end(signals, planner)
        _log.info("stopping", extra={"drain_timeout_s": config.drain_timeout})
        if not await server.drain(config.drain_timeout, planner.say_goodbye):
            _log.warning("calls were cut off: they did not finish in time")
    _log.info("stopped")
    if end is not None:
        raise end


@asynccontextmanager
async def _first_of(*awaited: Awaitable[Any]) -> AsyncIterator[Sequence[asyncio.Future[Any]]]:
    """Wait until any of these is done, and yield all of them; those not done by the end are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in awaited]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        yield tasks
    finally:
        for task in tasks:
            task.cancel()


async def _opened(signals: StopSignals, opening: Awaitable[Succession]) -> Succession | None:
    """Return the planner once it is open, or None if a signal arrives first, even if the store hangs."""
    async with _first_of(opening, signals.wait()) as (opened, _):
        if opened.done():
            planner: Succession = opened.result()
            return planner
        opened.cancel()
        found: Succession | BaseException = (await asyncio.gather(opened, return_exceptions=True))[0]
        if not isinstance(found, BaseException):  # it was opened at the same moment
            await found.close()
        return None


async def _until_the_end(signals: StopSignals, planner: Succession) -> BaseException | None:
    """Wait for a signal, or for the end of this planner's use; return the error that names it, None after a signal."""
    async with _first_of(planner.until_replaced(), signals.wait()) as (replaced, _):
        if not replaced.done():
            return None
        taken_over = ServiceError(Reason.ERROR_REASON_NOT_LEADER, "another planner has taken over the store")
        return replaced.exception() or taken_over


async def show_failure(loops: Loops, server: PlannerServer) -> None:
    """Wait for a failure, then report NOT_SERVING for all services; ``/healthz`` checks independently."""
    await loops.failed.wait()
    server.health.serve(False)


def _say_ready(addresses: Sequence[str], page_address: str, config: PlannerConfig, *, as_json: bool) -> None:
    page = f"http://{page_address}/" if page_address else None
    store = without_password(config.store)
    if as_json:
        print(json.dumps({"listen": addresses, "status_page": page, "store": store}), flush=True)
    scheme = "TLS" if config.tls is not None else "plain"
    shown = ", ".join(address if is_socket_path(address) else f"{address} ({scheme})" for address in addresses)
    with suppress(OSError):  # the disk of the log is full, which must not keep a planner from leading
        print(
            f"hetis-planner listens on {shown}, status page {page or 'off'}, store {store}", file=sys.stderr, flush=True
        )


def _leave_to_collector_what_is_new() -> None:
    """Tune the garbage collector, whose full collections block the event loop.

    With 3,000 agents they take 0.4 to 1 s, while leases last 20 s. Modules and all objects created so far stay for
    good, and are excluded. Later objects live long (agents, replicas) or are freed by reference counting; cycles are
    rare (errors with tracebacks, tasks), and are collected while young.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    sys.setswitchinterval(0.001)  # seconds that the event loop waits for a thread reading a document; default: 5 ms


_CODES = {signal.SIGINT: ServiceExitCode.INTERRUPTED, signal.SIGTERM: ServiceExitCode.TERMINATED}


class StopSignals:
    """Waits for the first signal to this process."""

    def __init__(self) -> None:
        self._requested = asyncio.Event()
        for number in _CODES:
            asyncio.get_running_loop().add_signal_handler(number, self._came, number)

    async def wait(self) -> None:
        await self._requested.wait()

    def close(self) -> None:
        for number in _CODES:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _came(self, number: signal.Signals) -> None:
        if self._requested.is_set():
            os._exit(_CODES[number])  # ends the process whatever hangs; the store is designed to survive this
        self._requested.set()
