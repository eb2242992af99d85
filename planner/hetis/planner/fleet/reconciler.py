"""Reconciliation of one cluster: decisions are written to the store, and then sent to the nodes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet import deciding, views
from hetis.planner.fleet.cluster import ClusterFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.stored_plans import StoredPlans
from hetis.planner.fleet.views import Clock, FleetObserver
from hetis.planner.fleet.writes import StoredCluster, Writes, apply, read_changes, read_clusters, read_ends
from hetis.planner.store import Reader, Store

_log = logging.getLogger("hetis.planner.fleet")


def read_again(cluster: ClusterFleet, reader: Reader) -> StoredCluster | None:
    """Return what has changed of a cluster since it was last read; all of it the first time; None if it is gone."""
    if cluster.record is None:
        return read_clusters(reader, [cluster.name]).get(cluster.name)
    replicas = {replica.name: replica.record.version for replica in cluster.replicas.values()}
    return read_changes(reader, cluster.name, nodes=cluster.node_records.versions, replicas=replicas)


_ENDS_AT_ONCE = 1000  # changes that one read looks up in the store
_LOOKED_UP_AT_ONCE = 256  # replicas whose plans are evaluated in one round; each round decides about all replicas
_PAUSE = 3.0  # between two rounds, in multiples of the last one's duration, so that later input is decided in one round
_MOST_PAUSE_S = 1.0
_ROUNDS = 100  # consecutive rounds before the event loop's other tasks have their turn


@dataclass(slots=True, eq=False, kw_only=True)
class Reconciler:
    """Brings the store and the nodes of one cluster to the wanted state whenever something has changed."""

    cluster: ClusterFleet  # its ``record`` is None before the first read, and once the cluster is gone
    store: Store
    hubs: Hubs
    plans: StoredPlans
    declared: DeclaredFleets
    clock: Clock
    observers: Sequence[FleetObserver]
    send: Callable[[ClusterFleet], None]
    lose_leadership: Callable[[ServiceError], None]
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while reading or deciding
    task: asyncio.Task[None] | None = None  # the running or scheduled reconciliation, or None
    _took_s: float = 0.0

    async def read(self, stored: StoredCluster | None = None) -> bool:
        """Read the cluster from the store, unless it is ``stored``; the caller must hold the lock.

        Return False if the cluster is gone.
        """
        if stored is None:
            stored = await self.store.read(partial(read_again, self.cluster))
        if stored is None:
            return False
        self.cluster.take(stored, (await self.declared.of(stored.cluster)).nodes, now_s=self.clock.monotonic())
        return True

    @property
    def has_work(self) -> bool:
        cluster = self.cluster
        return cluster.record is not None and (
            deciding.needs_decision(cluster) or bool(cluster.changes.late.unknown) or bool(cluster.unprepared)
        )

    def begin(self) -> None:
        """Start a round if there is something to decide; inputs that arrive together are decided together."""
        if self.task is None and self.has_work:
            self.task = asyncio.create_task(self._reconcile_soon(), name=f"reconciling {self.cluster.name}")

    async def reconcile(self) -> None:
        """Decide, write and send until nothing remains to be decided.

        Between two rounds others may have the lock: thousands of replicas take many rounds, and calls wait for it.
        """
        for _ in range(_ROUNDS):
            async with self.lock:
                if not self.has_work:
                    return
                await self._prepare()
                await self._ask_for_ends()
                writes = deciding.decide(self.cluster, now_s=self.clock.monotonic())
                if writes:
                    await self._keep(writes)

    async def _reconcile_soon(self) -> None:
        extra = {"cluster": self.cluster.name}
        try:
            await asyncio.sleep(min(_MOST_PAUSE_S, _PAUSE * self._took_s))
            began_s = self.clock.monotonic()
            await self.reconcile()
            self._took_s = self.clock.monotonic() - began_s
        except ServiceError as error:
            _log.warning("decisions could not be stored", extra={**extra, "reason": error.reason_name})
            self._took_s = _MOST_PAUSE_S  # as after a long round, so that the store is tried once a second
            if error.reason == Reason.ERROR_REASON_NOT_LEADER:
                self.lose_leadership(error)
        except Exception:
            self.cluster.counters.errors["reconciliation"] += 1
            _log.exception("reconciling a cluster failed", extra=extra)
        finally:
            self.task = None

    async def _keep(self, writes: Writes) -> None:
        cluster, kept_s = self.cluster, self.clock.time()
        try:
            kept = await self.store.write(partial(apply, writes=writes, now_s=kept_s))
        except BaseException:  # whatever the exception: no decision may be lost
            cluster.take_back(writes)
            raise
        cluster.applied(writes, kept)
        self.send(cluster)
        ended = cluster.changes.take_ended()
        now_s = self.clock.time()
        views.publish(cluster, self.hubs, now_s=now_s)
        for body in ended:
            views.publish_end(cluster, self.hubs, body, ended_s=kept_s, now_s=now_s)
        for observer in self.observers:
            for write in writes.replicas:
                observer.replica_changed(write.name)
            for body in ended:
                observer.redispatch_ended(body)

    async def _prepare(self) -> None:
        """Read the plans of replicas whose contents are not known yet."""
        cluster = self.cluster
        by_plan: dict[str, list[tuple[str, int]]] = {}
        for name in list(cluster.unprepared)[:_LOOKED_UP_AT_ONCE]:
            record = cluster.replicas[name].record
            by_plan.setdefault(record.plan, []).append((name, record.body.plan_index))
        for plan, replicas in by_plan.items():
            found = await self.plans.contents(plan, [index for _, index in replicas])
            for (name, _), contents in zip(replicas, found, strict=True):
                cluster.prepare(name, contents)

    async def _ask_for_ends(self) -> None:
        cluster = self.cluster
        names = {f"{cluster.name}/redispatches/{one}": one for one in cluster.changes.late.unknown[:_ENDS_AT_ONCE]}
        if not names:
            return
        found = await self.store.read(partial(read_ends, names=list(names)))
        for name, change_id in names.items():
            cluster.changes.found_late(change_id, found.get(name))
        self.send(cluster)
