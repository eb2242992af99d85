"""What resources need of the fleet: how things are now. Told apart from it, so that tests can stand in for it."""

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
        """Last report of every device."""

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
        """Last report of its primary."""

    @property
    def report_time_s(self) -> float | None: ...

    @property
    def redispatch(self) -> str:
        """Name of the one under way; empty: none."""


class FleetNow(Protocol):
    """The fleet's live view; all names are resource names."""

    def node_view(self, name: str) -> NodeNow | None: ...

    def nodes_of(self, cluster: str) -> Mapping[str, NodeNow]: ...

    def num_connected(self, cluster: str) -> int:
        """Nodes whose agents are connected; costs nothing, however large the cluster is."""

    def replica_view(self, name: str) -> ReplicaNow | None: ...

    def disconnect(self, name: str) -> None:
        """Ends the stream of a node's agent.

        Raises:
            ServiceError: NOT_FOUND, none is connected.
        """

    async def cluster_changed(self, cluster: str) -> None:
        """Something of it was changed in the store."""
