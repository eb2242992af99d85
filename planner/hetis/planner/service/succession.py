"""The sequence of leadership terms: this planner leads if no other one does, and stands by otherwise."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client.registry import Collector

from hetis.commands.endpoints import STANDBY_ANSWER
from hetis.commands.process import descriptor_of_stderr
from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.settings import FleetCounters
from hetis.planner.fleet.stored_plans import StoredPlans
from hetis.planner.service.assembly import Term
from hetis.planner.service.audit_refusals import AuditRefusals
from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.planner.service.gate import Gate
from hetis.planner.service.loops import Loops
from hetis.planner.service.methods import SERVICES, AnsweredBy, Method, needs_leader
from hetis.planner.service.observability.metrics import FleetCollector, StoreCollector
from hetis.planner.service.observability.overview import ClusterNow, Overview
from hetis.planner.service.servicers import servicing
from hetis.planner.service.settings import PlannerConfig, default_store
from hetis.planner.store import AuditedChange, Lease, Store, StoreError, Transaction

ANSWERED_S = 10.0  # a store whose last answer is older counts as unavailable
_AGAIN_S = 1.0  # pause after a term that could not begin
_BEGIN_S = 10.0  # how long agents wait for a term that begins
_LATE_S = 1.0  # a store that has not answered for so long does not tell whether another planner leads
_STEP_DOWN_S = 10.0  # time for the streams of a term to end, and again for the rest of the term
_log = logging.getLogger("hetis.planner.succession")


class Succession:
    """A planner across all its terms.

    Args:
        store: decides which planner leads; closed with this object.
        make_term: creates the term of an epoch; 0 stands for a term that only reads.
        holder, addresses: this planner's, which other planners return to callers.
        stands_by: whether this planner waits while another one leads, instead of ending.
        loops: the background tasks of all terms.
        refusals: refused changes, for the audit log.
        collectors: the metrics of all terms.
        step_down_s: how long to wait for the end of a term before standing by again.
    """

    def __init__(
        self,
        store: Store,
        make_term: Callable[[int], Term],
        *,
        holder: str,
        addresses: Sequence[str],
        stands_by: bool,
        loops: Loops,
        refusals: AuditRefusals,
        collectors: Sequence[Collector],
        step_down_s: float = _STEP_DOWN_S,
    ) -> None:
        self._store = store
        self._make_term = make_term
        self._holder, self._addresses = holder, tuple(addresses)
        self._stands_by = stands_by
        self.loops = loops
        self._refusals = refusals
        self._step_down_s = step_down_s
        self._standby = make_term(0)
        self._leading: Term | None = None
        self._lasting: asyncio.Task[None] | None = None
        self._end_streams: Callable[[ServiceError], Awaitable[None]] | None = None
        self._is_over = asyncio.Event()
        self._gate = Gate()  # closed while a term begins, or may begin soon
        self._unusable: StoreError | None = None
        self.collectors = tuple(collectors)
        self.servicings = tuple(servicing(service, self._answer) for service in SERVICES)

    @property
    def present(self) -> Term:
        """The term that answers now."""
        return self._leading or self._standby

    @property
    def lease(self) -> Lease:
        return self._store.leadership.lease

    @property
    def leads(self) -> bool:
        return self._leading is not None and self._store.leadership.lease.is_held

    @property
    def leader_address(self) -> str:
        """The addresses of another planner that leads, separated by commas; empty if they are unknown."""
        return self._store.leadership.not_leader().metadata.get("leader_address", "")

    def _answer(self, method: Method, request: Any, context: Any) -> Any:
        """Answer a call in the present term; a standby says that it lacks what only the leader knows."""
        if method.answered_by is AnsweredBy.ANY_IN_PART and not self.leads:
            context.set_trailing_metadata(((STANDBY_ANSWER, self.leader_address),))
        return method.carry_out(self.present.parts, request)

    async def start(self) -> None:
        """Lead, or start to stand by. Raises NOT_LEADER if it should not stand by, or STORE_UNAVAILABLE."""
        try:
            await self._begin(await self._store.leadership.grant(self._holder, self._addresses))
        except ServiceError as error:
            if error.reason != Reason.ERROR_REASON_NOT_LEADER or not self._stands_by:
                raise
            _log.info("standing by", extra={"leader": error.metadata.get("leader", "")})
        self._lasting = asyncio.create_task(self._go_on(), name="succession")
        self.loops.start("the store connection guard", self._store.until_failed())

    def require_leader(self, method: str) -> None:
        """Raise NOT_LEADER, with the leader's address, or STORE_UNAVAILABLE shortly before the lease expires."""
        if self.leads and not self._store.leadership.lease.may_decide:
            if needs_leader(method, reads_too=False):
                raise self._store.leadership.undecided()
        elif not self.leads and needs_leader(method, reads_too=True):
            raise self._store.leadership.not_leader()

    async def until_begun(self, is_change: bool) -> None:
        """Wait for the end of a term's beginning, if one is under way or near, for at most `_BEGIN_S`.

        Changes do not wait for those that came before them.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_BEGIN_S):
                await self._gate.passed(is_first=is_change)

    def on_loss(self, end_streams: Callable[[ServiceError], Awaitable[None]]) -> None:
        """Set the callback that ends the remaining streams when the term is over."""
        self._end_streams = end_streams

    @property
    def is_ready(self) -> bool:
        """Whether the planner can work, as a leader with a lease or as a standby, and its store does as it needs.

        A store whose disk is full still answers, but a leader also needs to write. A restart would not help it: whether
        the process is alive is another question.

        A standby cannot if no planner leads and it does not come to lead either: it may lack rights to the one row, or
        no planner can begin a term.
        """
        if self._store.health.answered_s_ago >= ANSWERED_S:
            return False
        if self._leading is not None:
            return self._store.leadership.lease.may_decide and self._store.health.unwritable_s < ANSWERED_S
        return self._stands_by and self._store.leadership.led_s_ago < ANSWERED_S

    async def overview(self) -> Overview:
        store, leader = self._store, self._store.leadership.leader
        found = await self.present.overviews.overview()
        return replace(
            found,
            leads=self.leads,
            leader=self._holder if self.leads else leader.name if leader is not None else "",
            lease_age_s=store.leadership.lease.age_s,
            store_answered_s_ago=store.health.answered_s_ago,
        )

    def clusters_now(self, only: str = "") -> Sequence[ClusterNow]:
        return self.present.overviews.clusters_now(only)

    async def cluster_details(self, name: str) -> Mapping[str, Any] | None:
        return await self.present.overviews.cluster_details(name)

    def note_refusal(self, change: AuditedChange) -> None:
        self._refusals.note(change)

    async def until_replaced(self) -> None:
        """Wait until this planner has no further use. One that stands by always has, as long as it knows the tables.

        Raises StoreError if a planner of another version has migrated them.
        """
        await self._is_over.wait()
        if self._unusable is not None:
            raise self._unusable

    async def say_goodbye(self) -> None:
        await self.present.say_goodbye()

    async def close(self) -> None:
        if self._lasting is not None:
            self._lasting.cancel()
            await asyncio.gather(self._lasting, return_exceptions=True)
        await self.loops.stop()
        if self._leading is not None:
            await self._leading.close()
        await self._standby.close()
        await self._store.close()

    async def _begin(self, epoch: int) -> None:
        began_s = time.monotonic()
        self._gate.set(False)
        try:
            term = self._make_term(epoch)
            try:
                await term.begin()
                await self._store.leadership.promote()
            except BaseException:
                await term.close()
                raise
            self._leading = term
        finally:
            self._gate.set(True)
        _log.info("leading", extra={"epoch": epoch, "began_in_s": round(time.monotonic() - began_s, 3)})

    async def _go_on(self) -> None:
        try:
            while True:
                if self._leading is not None:
                    await self._store.leadership.until_ended()
                    await self._step_down()
                    if not self._stands_by:
                        return
                try:
                    await self._begin(await self._until_free())
                except StoreError as error:
                    _log.error("the store cannot be used any more", extra={"why": str(error)})
                    self._unusable = error
                    return
                except ServiceError as error:
                    _log.warning("the term could not begin", extra={"why": str(error)})
                    await asyncio.sleep(_AGAIN_S)
                except Exception:
                    _log.exception("the term could not begin")
                    await asyncio.sleep(_AGAIN_S)
        finally:
            self._is_over.set()

    async def _until_free(self) -> int:
        """Stand by until no planner leads, with all that a term needs at hand, and return the epoch of a new term.

        Once a leader seems to be gone, agents that come wait for the next term, whoever leads in it. Refused, they
        would come again and again, and by then would keep the loop from beginning it.
        """
        tasks = [
            asyncio.create_task(self._standby.stand_by(), name="warming up a standby"),
            asyncio.create_task(self._hold_agents(), name="holding agents"),
        ]
        try:
            return await self._store.leadership.stand_by(self._holder, self._addresses)
        except BaseException:
            self._gate.set(True)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _hold_agents(self) -> None:
        while True:
            self._gate.set(self._store.leadership.is_led_surely or self._store.health.answered_s_ago > _LATE_S)
            await asyncio.sleep(_LATE_S / 4)

    async def _step_down(self) -> None:
        """End the term: agents and watchers move to the new leader; stored decisions remain valid."""
        term, self._leading = self._leading, None
        assert term is not None
        error = self._store.leadership.not_leader()
        _log.error("the term is over", extra={"leader": error.metadata.get("leader", "")})
        term.lose(error)
        if self._end_streams is not None:
            await self._in_time("the streams of the term", self._end_streams(error))
        await self._in_time("the term", term.close())

    async def _in_time(self, what: str, ending: Awaitable[None]) -> None:
        """Wait for an end, but not for ever: whatever hangs, this planner must stand by again."""
        task = asyncio.ensure_future(ending)
        try:
            for limit_s in (self._step_down_s, 1.0):
                done, _ = await asyncio.wait({task}, timeout=limit_s)
                if done:
                    break
                _log.error("%s did not end in %g s", what, limit_s)
                task.cancel()
        finally:
            task.cancel()
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s ended with an error", what, exc_info=error)


async def open_planner(config: PlannerConfig) -> Succession:
    """Open the store, and lead; or stand by if another planner leads and the configuration permits it.

    Raises:
        StoreError: the store cannot be used.
        ServiceError: NOT_LEADER if another planner leads and this one should not wait.
    """
    if config.store == default_store():
        Path(config.store.removeprefix("sqlite:///")).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    counters, loops = FleetCounters(), Loops()
    store = await Store.open(config.store, lease_s=config.leadership.lease)

    async def append(changes: Sequence[AuditedChange]) -> None:
        def work(tx: Transaction) -> None:
            for change in changes:
                tx.audit.append(change, time_s=tx.now_s)

        await store.write(work)

    refusals, declared, stored = AuditRefusals(append), DeclaredFleets(), StoredPlans(store)
    succession = Succession(
        store,
        lambda epoch: Term(
            config,
            store,
            epoch=epoch,
            counters=counters,
            loops=loops,
            refusals=refusals,
            declared=declared,
            stored=stored,
        ),
        holder=f"{socket.gethostname()}:{os.getpid()}",
        addresses=config.leadership.advertise,
        stands_by=config.stands_by,
        loops=loops,
        refusals=refusals,
        collectors=(FleetCollector(counters), StoreCollector(store.health, store.leadership.lease)),
    )
    try:
        await succession.start()
    except BaseException:
        await succession.close()
        raise
    return succession


TICK_S = 0.5
TICKS = 4  # in a row: a process that was suspended finds its lease expired, too, but then steps down


class OverdueTerm:
    """Detects a term that has been over for some time without the event loop noticing."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._ticks = 0

    def tick(self) -> bool:
        """Return whether the term has been overdue for `TICKS` ticks; must be called every `TICK_S` seconds."""
        self._ticks = self._ticks + 1 if self._lease.is_overdue else 0
        return self._ticks >= TICKS


def _end_process() -> None:
    """Dump the stacks of all threads and exit without cleanup, since any other way to end needs the event loop."""
    stderr = descriptor_of_stderr()
    with suppress(OSError):
        os.set_blocking(stderr, False)  # the event loop may hang because nothing reads the log
        os.write(
            stderr,
            b"the lease is over and the event loop hangs: this planner ends, so that its agents find the leader\n",
        )
    faulthandler.dump_traceback(stderr)
    os._exit(ServiceExitCode.INTERNAL)


def end_overdue_terms(lease: Lease) -> None:
    """End the process of a leader whose event loop hangs after its lease has expired; a file's lock never expires.

    The event loop dismisses agents and watchers when a term is over. If it hangs, gRPC's own threads still answer
    pings, so the agents would stay with this planner for as long as it hangs, and their nodes would be LOST to the next
    leader. A separate thread checks the lease, which depends on the machine's clock and not on the event loop.
    """
    if not lease.lease_s:
        return
    term = OverdueTerm(lease)

    def go_on() -> None:
        while not term.tick():
            time.sleep(TICK_S)
        _end_process()

    threading.Thread(target=go_on, name="the lease guard", daemon=True).start()
