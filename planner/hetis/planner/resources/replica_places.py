"""Which replicas run on a node: read from the store once, then only what has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hetis.planner.convert.names import last_part
from hetis.planner.store import Reader

_AT_ONCE = 500  # names in one query


class ReplicaPlaces:
    """Names of replicas by node id, for each cluster that was asked for. To be used in the store's thread alone."""

    def __init__(self) -> None:
        self._by_cluster: dict[str, _Places] = {}

    def read(self, tx: Reader, cluster: str) -> Mapping[str, Sequence[str]]:
        """Read the places as they are in this transaction; not to be changed."""
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
            by_node = dict[str, list[str]]()  # a new one: readers may still have the old one
            for name in sorted(nodes):
                for node in nodes[name]:
                    by_node.setdefault(node, []).append(name)
            self.by_node, self._nodes = by_node, nodes
        self._versions = present
