"""The nodes of a cluster: declared in its document, stored in records, seen by the fleet, and combined here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from hetis.planner.convert.clusters import node_message
from hetis.planner.convert.names import last_part, node_name
from hetis.planner.resources.declared import Declared, DeclaredFleets
from hetis.planner.resources.live import FleetNow, NodeNow
from hetis.planner.store import ClusterRecord, NodeRecord, Reader, Store
from hetis.v1 import cluster_pb2, view_pb2

State = cluster_pb2.NodeState
_MOST_BY_NAME = 500  # above it, all records of a cluster are read instead of the named ones

CONNECTED = frozenset({State.NODE_STATE_READY, State.NODE_STATE_UNDECLARED})
"""States of nodes whose agents are connected."""
_HERE = CONNECTED | {State.NODE_STATE_SUSPECT}  # an undeclared node is forgotten when its lease ends


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeViews:
    """The nodes of one cluster at one moment.

    Attributes:
        cluster: its record.
        declared: the content of its document.
        records: by node id; of all nodes, or of the requested ones.
        replicas: names of replicas by node id.
        live: by node id; of all nodes, or of the requested ones.
    """

    cluster: ClusterRecord
    declared: Declared
    records: Mapping[str, NodeRecord]
    replicas: Mapping[str, Sequence[str]]
    live: Mapping[str, NodeNow]

    def exists(self, node: str) -> bool:
        """Return whether the node is declared or connected."""
        live = self.live.get(node)
        return node in self.declared or (live is not None and live.state in _HERE)

    def state(self, node: str) -> State.ValueType:
        """Return the state of a node that exists."""
        live = self.live.get(node)
        if node not in self.declared:
            return State.NODE_STATE_UNDECLARED
        if live is not None:
            # Declared by now, but the fleet may not have noticed yet.
            undeclared = live.state == State.NODE_STATE_UNDECLARED
            return State.NODE_STATE_READY if undeclared else live.state
        record = self.records.get(node)
        was_connected = record is not None and record.body.HasField("connect_time")
        return State.NODE_STATE_LOST if was_connected else State.NODE_STATE_EXPECTED

    def node(self, node: str, view: view_pb2.View.ValueType) -> cluster_pb2.Node:
        """Return the message of a node that exists."""
        live = self.live.get(node)
        return node_message(
            node_name(self.cluster.name, node),
            view=view,
            state=self.state(node),
            record=self.records.get(node),
            devices=live.devices if live else (),
            replicas=self.replicas.get(node, ()),
            connect_time_s=live.connect_time_s if live else None,
            heard_time_s=live.heard_time_s if live else None,
        )

    def ids(self, states: Collection[State.ValueType] = ()) -> Sequence[str]:
        """Return the ids of all existing nodes in order; given ``states``, at least those of nodes in one of them."""
        undeclared = [node for node in self.live if node not in self.declared and self.exists(node)]
        if states and State.NODE_STATE_EXPECTED not in states:  # nearly all nodes of a large fleet may be EXPECTED
            heard_of = (node for node in {*self.live, *self.records} if node in self.declared)
            return sorted([*heard_of, *undeclared])
        if not undeclared:
            return self.declared.nodes
        return sorted([*self.declared.nodes, *undeclared])  # nearly sorted already, which is fast


class NodeReader:
    """Reads `NodeViews`."""

    def __init__(self, store: Store, fleet: FleetNow, fleets: DeclaredFleets) -> None:
        self._store = store
        self._fleet = fleet
        self._fleets = fleets
        self._places = ReplicaPlaces()

    async def read(self, cluster: str, nodes: Collection[str] | None = None) -> NodeViews:
        """Read the nodes of ``clusters/{cluster}``, with the state of these node ids or, if None, of all.

        Reading all is noticeably slow for a large fleet.

        Raises:
            ServiceError: NOT_FOUND if there is no such cluster.
        """
        record, kept, replicas = await self._store.read(lambda tx: _read(tx, cluster, nodes, self._places))
        return NodeViews(
            cluster=record,
            declared=await self._fleets.of(record),
            records=kept,
            replicas=replicas,
            live=self._live(cluster, nodes),
        )

    def _live(self, cluster: str, nodes: Collection[str] | None) -> dict[str, NodeNow]:
        if nodes is None:
            return {last_part(name): node for name, node in self._fleet.nodes_of(cluster).items()}
        found = {node: self._fleet.node_view(node_name(cluster, node)) for node in nodes}
        return {node: live for node, live in found.items() if live is not None}


def _read(
    tx: Reader, cluster: str, nodes: Collection[str] | None, places: ReplicaPlaces
) -> tuple[ClusterRecord, dict[str, NodeRecord], Mapping[str, Sequence[str]]]:
    record = tx.clusters.require(cluster)
    if nodes is None or len(nodes) > _MOST_BY_NAME:
        kept = tx.nodes.all(cluster=cluster)
    else:
        kept = tx.nodes.all(name=[node_name(cluster, node) for node in nodes])
    return record, {last_part(node.name): node for node in kept}, places.read(tx, cluster)


_AT_ONCE = 500  # names per query


class ReplicaPlaces:
    """Names of replicas by node id, for each requested cluster. Only for use in the store's thread."""

    def __init__(self) -> None:
        self._by_cluster: dict[str, _Places] = {}

    def read(self, tx: Reader, cluster: str) -> Mapping[str, Sequence[str]]:
        """Return the places as of this transaction; not to be modified."""
        present = tx.replicas.versions(cluster=cluster)
        if not present:
            self._by_cluster.pop(cluster, None)
            return {}
        places = self._by_cluster.setdefault(cluster, _Places())
        places.update(tx, present)
        return places.by_node


class _Places:
    def __init__(self) -> None:
        self.by_node: Mapping[str, Sequence[str]] = {}
        self._versions: dict[str, int] = {}
        self._nodes: dict[str, tuple[str, ...]] = {}

    def update(self, tx: Reader, present: dict[str, int]) -> None:
        if present == self._versions:
            return
        changed = [name for name, version in present.items() if self._versions.get(name) != version]
        nodes = {name: found for name, found in self._nodes.items() if name in present}
        for start in range(0, len(changed), _AT_ONCE):
            for replica in tx.replicas.all(name=changed[start : start + _AT_ONCE]):
                nodes[replica.name] = tuple(last_part(node) for node in replica.body.nodes)
        if nodes != self._nodes:
            by_node = dict[str, list[str]]()  # a new mapping, since readers may still hold the old one
            for name in sorted(nodes):
                for node in nodes[name]:
                    by_node.setdefault(node, []).append(name)
            self.by_node, self._nodes = by_node, nodes
        self._versions = present
