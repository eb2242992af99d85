"""The hubs of one leadership term, from which watchers of plans and clusters receive changes."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection

from google.protobuf.message import Message

from hetis.planner.convert.clusters import BASIC, cluster_message
from hetis.planner.convert.names import node_name
from hetis.planner.store import ClusterRecord
from hetis.planner.store.tables import KEPT_REDISPATCHES
from hetis.planner.watching import Hub
from hetis.v1 import cluster_pb2, plan_pb2

_MOST_ENCODED = 1_000  # per cluster; others are read and encoded again
_MOST_ONE_BY_ONE = 1000  # nodes; if more of them change at once, watchers receive the whole present state again


class ClusterHub(Hub[tuple[str, str], Message]):
    """The hub of one cluster.

    Keys are ("cluster", name), ("node", name), ("replica", name), ("redispatch", name); values are in the view BASIC.
    As in the store, only the last 1,000 re-dispatches are kept, since re-dispatches are never removed.
    """

    def __init__(self, epoch: int) -> None:
        super().__init__(epoch)
        self._redispatches: OrderedDict[tuple[str, str], None] = OrderedDict()
        self.encoding = asyncio.Lock()  # held while events are encoded for watchers
        self.encoded: OrderedDict[int, bytes] = OrderedDict()  # what watchers are sent about events, by sequence

    def publish(self, key: tuple[str, str], value: Message | None, *, now_s: float) -> int:
        if key[0] == "redispatch" and value is not None:
            self._redispatches[key] = None
            if len(self._redispatches) > KEPT_REDISPATCHES:
                oldest, _ = self._redispatches.popitem(last=False)
                super().publish(oldest, None, now_s=now_s)
        return super().publish(key, value, now_s=now_s)

    def keep_encoded(self, sequence: int, content: bytes) -> None:
        """Keep what watchers are sent about an event."""
        self.encoded[sequence] = content
        if len(self.encoded) > _MOST_ENCODED:
            self.encoded.popitem(last=False)


class Hubs:
    """All hubs of one leadership term. ``plans`` is by plan name, with values in the view BASIC."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.plans: Hub[str, plan_pb2.Plan] = Hub(epoch)
        self._clusters: dict[str, ClusterHub] = {}
        self._rounds: dict[str, int] = {}
        self._is_closed = False
        self._error: Exception | None = None

    def cluster(self, name: str) -> ClusterHub:
        """Return a cluster's hub. Do not keep it: a cluster that is deleted and created again has a new hub."""
        if name not in self._clusters:
            self._clusters[name] = ClusterHub(self.epoch)
            if self._is_closed:  # its watches end at once, like those of the others
                self._clusters[name].close(self._error)
        return self._clusters[name]

    def publish_cluster(self, record: ClusterRecord, *, num_connected: int, now_s: float) -> None:
        """Publish that the document, policy, plans or number of connected nodes of a cluster have changed."""
        message = cluster_message(record, view=BASIC, num_connected=num_connected)
        self.cluster(record.name).publish(("cluster", record.name), message, now_s=now_s)

    def publish_nodes(self, cluster: str, nodes: Collection[str], *, now_s: float) -> None:
        """Publish that these nodes were changed, added or removed; watches read their state when they need it."""
        if len(nodes) > _MOST_ONE_BY_ONE:
            self.renew_cluster(cluster)
            return
        for node in nodes:
            name = node_name(cluster, node)
            self.cluster(cluster).publish(("node", name), cluster_pb2.Node(name=name), now_s=now_s)

    def round_of(self, name: str) -> int:
        """Return how often `renew_cluster` was called: sequences are valid only within one round."""
        return self._rounds.get(name, 0)

    def renew_cluster(self, name: str) -> None:
        """Restart all watches of a cluster after more changes than are worth single events."""
        self._rounds[name] = self.round_of(name) + 1
        self.remove_cluster(name)

    def remove_cluster(self, name: str) -> None:
        """End the watches of a deleted cluster."""
        if hub := self._clusters.pop(name, None):
            hub.close()

    def close(self, error: Exception | None = None) -> None:
        """End all watches, with ``error`` if there is one, and those of hubs that are still made."""
        if not self._is_closed:
            self._is_closed, self._error = True, error
        self.plans.close(error)
        for hub in self._clusters.values():
            hub.close(error)
