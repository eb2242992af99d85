"""The content of clusters' documents, parsed once."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property

from hetis.planner.convert import documents
from hetis.planner.store import ClusterRecord
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.solver.cluster import Cluster

_KEPT_NODES = 100 * documents.MAX_NODES  # in all parsed clusters together; about 80 bytes each


class Declared:
    """A cluster's document, and the ids of its nodes in order. Slow to make for a large fleet."""

    def __init__(self, value: Cluster) -> None:
        self.value = value
        self.nodes: Sequence[str] = sorted(_nodes(value))

    @cached_property
    def known(self) -> frozenset[str]:
        """Return the ids as a set."""
        return frozenset(self.nodes)

    def __contains__(self, node: str) -> bool:
        place = bisect_left(self.nodes, node)
        return place < len(self.nodes) and self.nodes[place] == node


class DeclaredFleets:
    """The clusters used most recently, by digest; a new document has a new digest, so entries never become stale."""

    def __init__(self) -> None:
        self._by_digest: OrderedDict[str, Declared] = OrderedDict()

    async def of(self, record: ClusterRecord) -> Declared:
        """Return the declared cluster, parsing its document in a thread if necessary."""
        digest = record.body.document.digest
        if digest not in self._by_digest:
            self._by_digest[digest] = await run_in_thread_gc_paused(_read, record)
            self._forget_some()
        self._by_digest.move_to_end(digest)
        return self._by_digest[digest]

    def _forget_some(self) -> None:
        num_nodes = sum(len(declared.nodes) for declared in self._by_digest.values())
        while num_nodes > _KEPT_NODES and len(self._by_digest) > 1:
            num_nodes -= len(self._by_digest.popitem(last=False)[1].nodes)


def _read(record: ClusterRecord) -> Declared:
    return Declared(documents.read_cluster(record.body.document))


def _nodes(cluster: Cluster) -> Iterator[str]:
    for group in cluster.node_groups:
        yield from (group.node_name(index) for index in range(group.count))
