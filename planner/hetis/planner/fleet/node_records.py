"""The stored records of a cluster's nodes, and what is to be written of them."""

from __future__ import annotations

from collections.abc import Callable

from hetis.planner.convert.names import last_part, node_name
from hetis.planner.fleet.agents.link import NodeLink
from hetis.planner.fleet.writes import NodeWrite, Writes
from hetis.planner.store import NodeRecord
from hetis.v1 import inventory_pb2

_DELETED_AT_ONCE = 100  # node records per transaction


class NodeRecords:
    """The records of the nodes of ``cluster``, by node id.

    Attributes:
        writes: what agents reported of their nodes since the last write.
        unneeded: nodes whose records may have to be deleted.
    """

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._records: dict[str, NodeRecord] = {}
        self.writes: dict[str, NodeWrite] = {}
        self.unneeded: dict[str, None] = {}

    def __contains__(self, node: str) -> bool:
        return node in self._records

    @property
    def versions(self) -> dict[str, int]:
        """The versions of the records by name."""
        return {record.name: record.version for record in self._records.values()}

    def get(self, node: str) -> NodeRecord | None:
        return self._records.get(node)

    def is_draining(self, node: str) -> bool:
        record = self._records.get(node)
        return record is not None and record.draining

    def take(self, record: NodeRecord) -> bool:
        """Take a newer record; return whether the node begins or ends to drain."""
        node = last_part(record.name)
        was_draining = self.is_draining(node)
        self._records[node] = record
        return record.draining != was_draining

    def drop(self, name: str) -> None:
        """Drop the record of this name, which was deleted."""
        self._records.pop(last_part(name), None)

    def report(
        self, node: str, link: NodeLink, inventory: inventory_pb2.NodeInventory | None, *, connect_time_s: float
    ) -> None:
        """Schedule a write of what the agent reported of its node; None keeps an inventory that is not written yet."""
        before = self.writes.get(node)
        self.writes[node] = NodeWrite(
            name=link.node,
            inventory=inventory if inventory is not None else before.inventory if before is not None else None,
            agent_version=link.agent_version,
            engine_address=link.engine_address,
            connect_time_s=connect_time_s,
        )

    def forget(self, node: str) -> None:
        """Write nothing more of a node that is not needed, and delete its record unless it drains."""
        self.writes.pop(node, None)
        if node in self._records and not self.is_draining(node):
            self.unneeded[node] = None

    def take_unneeded(self, is_needed: Callable[[str], bool]) -> list[str]:
        """Return the names of some nodes whose records are to be deleted; the caller's write deletes them."""
        taken = list(self.unneeded)[:_DELETED_AT_ONCE]
        for node in taken:
            del self.unneeded[node]
        return [node_name(self._cluster, node) for node in taken if not is_needed(node)]

    def take_back(self, writes: Writes) -> None:
        """Schedule what could not be written again."""
        for write in writes.nodes:
            self.writes.setdefault(last_part(write.name), write)
        self.unneeded.update(dict.fromkeys(map(last_part, writes.unneeded_nodes)))
