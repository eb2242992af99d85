"""The stored records, one class per table. Bodies are messages of the API: the caller's input and what was found.

Fields that a resource shows besides its body (states that live in memory, times, etags) are added in ``convert``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hetis.v1 import cluster_pb2, plan_pb2, profile_pb2, redispatch_pb2, replica_pb2


class Record(Protocol):
    """The fields of every record: its resource name, and its version, which each update raises by one."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...


def etag_of(record: Record | None) -> str:
    """Return the value that conditional changes compare. None stands for a resource that is not stored yet."""
    return f"v{record.version if record else 0}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """A cluster: ``body`` has the whole document, the policy and the counts derived from the document."""

    name: str
    body: cluster_pb2.Cluster
    version: int = 1
    active_plan: str = ""  # active or being activated; empty if none
    earlier_plan: str = ""  # the target of RollbackPlan; empty if none
    create_time_s: float
    update_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A node that an agent connected for, or that was drained: ``body`` has inventory, agent_version and times."""

    name: str
    cluster: str
    body: cluster_pb2.Node
    draining: bool = False
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRecord:
    """A profile: ``body`` has the whole document and what is derived from it."""

    name: str
    gpu_type: str
    body: profile_pb2.Profile
    version: int = 1
    create_time_s: float
    update_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """A plan: ``body`` has everything but the Plan document, which is in ``plan_documents``."""

    name: str
    cluster: str
    body: plan_pb2.Plan
    state: plan_pb2.PlanState.ValueType
    activation: plan_pb2.ActivationState.ValueType
    version: int = 1
    create_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRecord:
    """A replica, until it is stopped."""

    name: str
    cluster: str
    plan: str  # empty once it belongs to no plan and is stopping
    body: replica_pb2.Replica
    state: replica_pb2.ReplicaState.ValueType
    generation: int = 0
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RedispatchRecord:
    """A re-dispatch, in progress or ended."""

    name: str
    cluster: str
    replica: str
    body: redispatch_pb2.Redispatch
    state: redispatch_pb2.RedispatchState.ValueType
    version: int = 1
    create_time_s: float
