"""The interface of the fleet for dispatch and re-dispatch: running replicas, without streams, leases or the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from hetis.v1 import cluster_pb2, head_map_pb2, redispatch_pb2, replica_pb2, report_pb2, stage_pb2


class RunningReplica(Protocol):
    """A replica as it is now; implemented by `hetis.planner.fleet.views.LiveReplica`."""

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
        """Conditions by GPU as ``node/index``; GPUs not listed are OK."""
        ...

    @property
    def redispatch(self) -> str:
        """The re-dispatch under way, or an empty string."""
        ...


class ReadHeadMaps(Protocol):
    """All head maps of a replica at one step, as read by its authority."""

    @property
    def generation(self) -> int: ...
    @property
    def maps(self) -> Sequence[head_map_pb2.HeadMap]: ...


class RunningReplicas(Protocol):
    """Source of running replicas."""

    def replica_view(self, name: str) -> RunningReplica | None: ...


class Redispatching(RunningReplicas, Protocol):
    """The methods of the fleet that the re-dispatch loop uses."""

    def policy_of(self, cluster: str) -> cluster_pb2.ClusterPolicy:
        """Return what the planner may do in the cluster; an empty policy has the defaults."""
        ...

    async def read_head_maps(self, replica: str, timeout_s: float) -> ReadHeadMaps: ...

    async def redispatch(self, redispatch: redispatch_pb2.Redispatch) -> None:
        """Store it, and drive it through two phases unless it is ADVISED."""
        ...
