"""Hubs of watchers: one for plans, and one for each cluster with everything in it."""

from __future__ import annotations

from collections import OrderedDict

from google.protobuf.message import Message

from hetis.planner.store.tables import KEPT_REDISPATCHES
from hetis.planner.watching import Hub
from hetis.v1 import plan_pb2


class ClusterHub(Hub[tuple[str, str], Message]):
    """The hub of one cluster.

    Keys are ("cluster", name), ("node", name), ("replica", name), ("redispatch", name); values in the view BASIC. Only
    the last 1,000 re-dispatches are kept, as in the store, since re-dispatches are never removed.
    """

    def __init__(self, epoch: int) -> None:
        super().__init__(epoch)
        self._redispatches: OrderedDict[tuple[str, str], None] = OrderedDict()

    def publish(self, key: tuple[str, str], value: Message | None, *, now_s: float) -> int:
        if key[0] == "redispatch" and value is not None:
            self._redispatches[key] = None
            if len(self._redispatches) > KEPT_REDISPATCHES:
                oldest, _ = self._redispatches.popitem(last=False)
                super().publish(oldest, None, now_s=now_s)
        return super().publish(key, value, now_s=now_s)


class Hubs:
    """The hubs of one leadership term.

    Attributes:
        epoch: the term.
        plans: by plan name; values in the view BASIC.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.plans: Hub[str, plan_pb2.Plan] = Hub(epoch)
        self._clusters: dict[str, ClusterHub] = {}
        self._rounds: dict[str, int] = {}

    def cluster(self, name: str) -> ClusterHub:
        """Return the hub of ``clusters/{cluster}``.

        Call it each time: a cluster that is deleted and made again has a new one.
        """
        if name not in self._clusters:
            self._clusters[name] = ClusterHub(self.epoch)
        return self._clusters[name]

    def round_of(self, name: str) -> int:
        """Return how often `renew_cluster` was called: sequence numbers are only valid within one round."""
        return self._rounds.get(name, 0)

    def renew_cluster(self, name: str) -> None:
        """Restart all watches of a cluster, when too much has changed to be worth single events."""
        self._rounds[name] = self.round_of(name) + 1
        self.remove_cluster(name)

    def remove_cluster(self, name: str) -> None:
        """End the watches of a deleted cluster."""
        if hub := self._clusters.pop(name, None):
            hub.close()

    def close(self) -> None:
        """End all watches."""
        self.plans.close()
        for hub in self._clusters.values():
            hub.close()
