"""Publishes to the watchers of clusters what calls have changed."""

from __future__ import annotations

from collections.abc import Collection

from hetis.planner.convert.clusters import BASIC, cluster_message
from hetis.planner.convert.names import node_name
from hetis.planner.resources.hubs import Hubs
from hetis.planner.resources.live import FleetNow
from hetis.planner.store import ClusterRecord
from hetis.v1 import cluster_pb2

_MOST_ONE_BY_ONE = 1000  # nodes; above it, watchers get the whole present state again


def publish_cluster(hubs: Hubs, fleet: FleetNow, record: ClusterRecord, *, now_s: float) -> None:
    """Publish that the document, policy or plans of a cluster have changed."""
    message = cluster_message(record, view=BASIC, num_connected=fleet.num_connected(record.name))
    hubs.cluster(record.name).publish(("cluster", record.name), message, now_s=now_s)


def publish_nodes(hubs: Hubs, cluster: str, nodes: Collection[str], *, now_s: float) -> None:
    """Publish that these nodes were changed, added or removed; watches look up their state."""
    if len(nodes) > _MOST_ONE_BY_ONE:
        hubs.renew_cluster(cluster)
        return
    for node in nodes:
        name = node_name(cluster, node)
        hubs.cluster(cluster).publish(("node", name), cluster_pb2.Node(name=name), now_s=now_s)
