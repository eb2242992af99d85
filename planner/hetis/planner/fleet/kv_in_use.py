"""The share of KV memory in use on a cluster's devices, as last reported."""

from __future__ import annotations

from collections.abc import Iterator

from hetis.planner.fleet.cluster import ClusterFleet
from hetis.v1 import cluster_pb2


def kv_in_use(cluster: ClusterFleet) -> Iterator[tuple[str, float]]:
    """Yield devices with the share of their KV blocks in use, except those of lost nodes.

    The node's own report of its device counts, over all replicas on it. An engine that only knows the loads of its own
    stages reports them with the replica; then the fullest stage of a device stands for it.
    """
    seen = set[str]()
    for node, link in list(cluster.links.items()):
        if not _is_there(cluster, node):
            continue
        for device in link.devices:
            if device.total_blocks:
                name = f"{node}/{device.index}"
                seen.add(name)
                yield name, device.used_blocks / device.total_blocks
    for replica in list(cluster.replicas.values()):
        if replica.report is None or replica.is_stopping:
            continue
        fullest = dict[str, float]()
        for stage in replica.report.stages:
            for load in stage.devices:
                if load.total_blocks and load.device not in seen and _is_there(cluster, load.device.partition("/")[0]):
                    share = load.used_blocks / load.total_blocks
                    fullest[load.device] = max(fullest.get(load.device, 0.0), share)
        yield from fullest.items()


def _is_there(cluster: ClusterFleet, node: str) -> bool:
    state = cluster.leases.state(node)
    return state in (cluster_pb2.NODE_STATE_READY, cluster_pb2.NODE_STATE_SUSPECT)
