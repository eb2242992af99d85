"""What dispatch and re-dispatch see of the fleet: running replicas, and nothing of streams, leases or the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from hetis.v1 import cluster_pb2, head_map_pb2, redispatch_pb2, replica_pb2, report_pb2, stage_pb2


class RunningReplica(Protocol):
    """A replica as it is now; as `hetis.planner.fleet.views.LiveReplica`."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> replica_pb2.ReplicaState.ValueType: ...
    @property
    def generation(self) -> int: ...
    @property
    def authority(self) -> replica_pb2.HeadMapAuthority.ValueType: ...
    @property
    def primary_node(self) -> str:
        """Node id."""
        ...

    @property
    def stages(self) -> Sequence[stage_pb2.StageModel]: ...
    @property
    def conditions(self) -> Mapping[str, report_pb2.DeviceStatus.ValueType]:
        """Conditions by GPU as ``node/index``; a GPU that is not here is OK."""
        ...

    @property
    def redispatch(self) -> str:
        """Re-dispatch under way; empty: none."""
        ...


class ReadHeadMaps(Protocol):
    """All head maps of a replica at one step, as its authority read them out."""

    @property
    def generation(self) -> int: ...
    @property
    def maps(self) -> Sequence[head_map_pb2.HeadMap]: ...


class RunningReplicas(Protocol):
    """Source of what is known of running replicas."""

    def replica_view(self, name: str) -> RunningReplica | None: ...


class Redispatching(RunningReplicas, Protocol):
    """What the re-dispatch loop asks of the fleet."""

    def policy_of(self, cluster: str) -> cluster_pb2.ClusterPolicy:
        """Return what the planner may do in it; an empty one has the defaults."""
        ...

    async def read_head_maps(self, replica: str, timeout_s: float) -> ReadHeadMaps: ...

    async def redispatch(self, redispatch: redispatch_pb2.Redispatch) -> None:
        """Keeps a record of it, and drives it through two phases unless it is ADVISED."""
        ...
