"""The planner's side of one cluster without a loop, which takes the steps of `Fleet` synchronously."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from hetis.planner.fleet import deciding
from hetis.planner.fleet.agents.link import Response
from hetis.planner.fleet.cluster import ClusterFleet
from hetis.planner.fleet.reconciler import read_again
from hetis.planner.fleet.settings import FleetCounters, FleetSettings
from hetis.planner.fleet.writes import apply, read_ends
from tests.planner.fleet.memory_store import MemoryStore
from tests.planner.fleet.samples import CLUSTER, SETTINGS, contents


class DrivenPlanner:
    def __init__(
        self,
        store: MemoryStore,
        epoch: int,
        send: Callable[[str, Response], None],
        *,
        now_s: float,
        nodes: Sequence[str] = ("a", "b", "c"),
        settings: FleetSettings = SETTINGS,
    ) -> None:
        self.store, self.epoch = store, epoch
        self._send = send
        self.nodes = nodes  # declared in the cluster's document
        self.cluster = ClusterFleet(CLUSTER, epoch=epoch, settings=settings, counters=FleetCounters())
        self.reread(now_s)

    def reread(self, now_s: float) -> None:
        stored = read_again(self.cluster, self.store.tables)  # type: ignore[arg-type]
        assert stored is not None
        self.cluster.take(stored, self.nodes, now_s=now_s)

    def settle(self, now_s: float) -> None:
        """Decide, store and send until no decision is left."""
        cluster = self.cluster
        for _ in range(100):
            for name in list(cluster.unprepared):
                cluster.prepare(name, contents())
            for change_id in cluster.changes.late.unknown:
                name = f"{CLUSTER}/redispatches/{change_id}"
                cluster.changes.found_late(change_id, read_ends(self.store.tables, [name]).get(name))  # type: ignore[arg-type]
            writes = deciding.decide(cluster, now_s=now_s)
            if writes:
                kept = self.store.write_as(self.epoch, partial(apply, writes=writes, now_s=now_s))
                cluster.applied(writes, kept)
            self.send(now_s)
            if not deciding.needs_decision(cluster) and not cluster.changes.late.unknown:
                return
        raise AssertionError("it never settles")

    def send(self, now_s: float) -> None:
        for node, messages in self.cluster.messages(now_s).items():
            for message in messages:
                self._send(node, message)
