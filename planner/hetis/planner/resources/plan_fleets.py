"""A fleet less the nodes that a new plan cannot count on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from hetis.solver.cluster import Cluster, Network, NodeGroup


def without_nodes(cluster: Cluster, nodes: Collection[str]) -> Cluster:
    """The cluster without these nodes; the others keep their names and their links."""
    if not nodes:
        return cluster
    groups = tuple(part for group in cluster.node_groups for part in _rest(group, nodes))
    network: Network = replace(
        cluster.network,
        between_nodes={
            pair: link for pair, link in cluster.network.between_nodes.items() if not set(pair) & set(nodes)
        },
        between_zones={
            pair: link
            for pair, link in cluster.network.between_zones.items()
            if set(pair) <= {group.zone for group in groups}
        },
    )
    return replace(cluster, node_groups=groups, network=network)


def _rest(group: NodeGroup, nodes: Collection[str]) -> Iterator[NodeGroup]:
    """A group counts from 0 without gaps: what stands behind the first gap becomes groups of one node each."""
    names = [group.node_name(index) for index in range(group.count)]
    gaps = [index for index, name in enumerate(names) if name in nodes]
    if not gaps:
        yield group
        return
    if gaps[0]:
        yield replace(group, count=gaps[0])
    for name in names[gaps[0] :]:
        if name not in nodes:
            yield replace(group, name=name, count=1, numbered=False)
