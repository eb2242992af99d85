"""What is kept, one class per table. Bodies are the messages of the contract: what callers wrote and what was found.

What a resource shows beside its body (states that live in memory, times, etags) is put together in ``convert``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hetis.v1 import cluster_pb2, plan_pb2, profile_pb2, redispatch_pb2, replica_pb2


class Record(Protocol):
    """What every record has: its resource name, and its version, which each update raises by one."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...


def etag_of(record: Record | None) -> str:
    """Return what conditional changes compare. None: a resource of which nothing is kept yet."""
    return f"v{record.version if record else 0}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """A cluster: ``body`` has document (whole), policy and the counts that follow from the document."""

    name: str
    body: cluster_pb2.Cluster
    version: int = 1
    active_plan: str = ""  # active or being activated; empty: none
    earlier_plan: str = ""  # where RollbackPlan goes; empty: nowhere
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
    """A profile: ``body`` has the document (whole) and what follows from it."""

    name: str
    gpu_type: str
    body: profile_pb2.Profile
    version: int = 1
    create_time_s: float
    update_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """A plan: ``body`` has all but its Plan document, which is in ``plan_documents``."""

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
    plan: str  # empty: of no plan any more, it is stopping
    body: replica_pb2.Replica
    state: replica_pb2.ReplicaState.ValueType
    generation: int = 0
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RedispatchRecord:
    """A re-dispatch, under way or ended."""

    name: str
    cluster: str
    replica: str
    body: redispatch_pb2.Redispatch
    state: redispatch_pb2.RedispatchState.ValueType
    version: int = 1
    create_time_s: float
