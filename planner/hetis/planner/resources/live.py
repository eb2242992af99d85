"""The live state of the fleet that resources need, as protocols, so that tests can replace the fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from hetis.v1 import cluster_pb2, inventory_pb2, replica_pb2, report_pb2


class NodeNow(Protocol):
    """A node whose agent is connected, or was in this term."""

    @property
    def state(self) -> cluster_pb2.NodeState.ValueType: ...

    @property
    def devices(self) -> Sequence[report_pb2.DeviceReport]:
        """The last report of every device."""

    @property
    def inventory(self) -> inventory_pb2.NodeInventory | None: ...

    @property
    def connect_time_s(self) -> float | None: ...

    @property
    def heard_time_s(self) -> float | None: ...


class ReplicaNow(Protocol):
    """A replica that nodes of this term know."""

    @property
    def state(self) -> replica_pb2.ReplicaState.ValueType: ...

    @property
    def generation(self) -> int: ...

    @property
    def report(self) -> report_pb2.ReplicaReport | None:
        """The last report of its primary, or None."""

    @property
    def report_time_s(self) -> float | None: ...

    @property
    def redispatch(self) -> str:
        """The name of the re-dispatch under way, or an empty string."""


class FleetNow(Protocol):
    """The live state of the fleet; all names are resource names."""

    def node_view(self, name: str) -> NodeNow | None: ...

    def nodes_of(self, cluster: str) -> Mapping[str, NodeNow]: ...

    def num_connected(self, cluster: str) -> int:
        """Return the number of nodes whose agents are connected; takes no time, however large the cluster is."""

    def replica_view(self, name: str) -> ReplicaNow | None: ...

    def disconnect(self, name: str) -> None:
        """End the stream of a node's agent.

        Raises:
            ServiceError: NOT_FOUND if none is connected.
        """

    async def cluster_changed(self, cluster: str) -> None:
        """Note that the cluster's records were changed in the store."""
