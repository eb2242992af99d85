"""Nodes for watchers, looked up once per change, however many watch."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from hetis.planner.convert.clusters import BASIC
from hetis.planner.resources.hubs import ClusterHub
from hetis.planner.resources.node_views import NodeReader
from hetis.v1 import cluster_pb2

_KEPT = 10_000  # nodes per cluster, about a kilobyte each; others are looked up again


class ShownNodes:
    """The nodes of all clusters in the view BASIC, as of their last event or later."""

    def __init__(self, reader: NodeReader) -> None:
        self._reader = reader
        self._of: WeakKeyDictionary[ClusterHub, _Shown] = WeakKeyDictionary()

    async def read(
        self, hub: ClusterHub, cluster: str, events: Mapping[str, int]
    ) -> Mapping[str, cluster_pb2.Node | None]:
        """Return nodes by id, not to be modified; None for a node that is gone.

        Args:
            hub: of the cluster; sequence numbers of another hub do not apply.
            events: sequence number of the last event of each node.

        Raises:
            ServiceError: NOT_FOUND if there is no such cluster.
        """
        shown = self._of.setdefault(hub, _Shown())
        async with shown.reading:  # concurrent callers find what is being read
            found = {node: shown.nodes[node][1] for node, sequence in events.items() if shown.has(node, sequence)}
            missing = [node for node in events if node not in found]
            if missing:
                views = await self._reader.read(cluster, missing)
                for node in missing:
                    found[node] = views.node(node, BASIC) if views.exists(node) else None
                    shown.keep(node, events[node], found[node])
        return found


class _Shown:
    def __init__(self) -> None:
        self.reading = asyncio.Lock()
        self.nodes: OrderedDict[str, tuple[int, cluster_pb2.Node | None]] = OrderedDict()

    def has(self, node: str, sequence: int) -> bool:
        kept = self.nodes.get(node)
        return kept is not None and kept[0] >= sequence

    def keep(self, node: str, sequence: int, message: cluster_pb2.Node | None) -> None:
        self.nodes[node] = (sequence, message)
        self.nodes.move_to_end(node)
        if len(self.nodes) > _KEPT:
            self.nodes.popitem(last=False)
