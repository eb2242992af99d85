"""Records to store."""

from __future__ import annotations

from hetis.planner.store import ClusterRecord, NodeRecord, PlanRecord, ProfileRecord, RedispatchRecord, ReplicaRecord
from hetis.v1 import cluster_pb2, plan_pb2, profile_pb2, redispatch_pb2, replica_pb2


def cluster(name: str, *, text: bytes = b"", time_s: float = 1.5) -> ClusterRecord:
    body = cluster_pb2.Cluster(name=name)
    body.document.content = text
    return ClusterRecord(name=name, body=body, create_time_s=time_s, update_time_s=time_s)


def node(name: str) -> NodeRecord:
    return NodeRecord(name=name, cluster=name.partition("/nodes/")[0], body=cluster_pb2.Node(name=name))


def profile(name: str, *, gpu_type: str = "L4") -> ProfileRecord:
    body = profile_pb2.Profile(name=name, gpu_type=gpu_type)
    return ProfileRecord(name=name, gpu_type=gpu_type, body=body, create_time_s=1.0, update_time_s=2.0)


def plan(name: str, *, cluster: str = "clusters/a", time_s: float = 1.0) -> PlanRecord:
    return PlanRecord(
        name=name,
        cluster=cluster,
        body=plan_pb2.Plan(name=name, cluster=cluster),
        state=plan_pb2.PLAN_STATE_QUEUED,
        activation=plan_pb2.ACTIVATION_STATE_INACTIVE,
        create_time_s=time_s,
    )


def replica(name: str, *, plan: str = "plans/p") -> ReplicaRecord:
    return ReplicaRecord(
        name=name,
        cluster=name.partition("/replicas/")[0],
        plan=plan,
        body=replica_pb2.Replica(name=name, plan=plan),
        state=replica_pb2.REPLICA_STATE_STARTING,
        generation=2**53 + 1,
    )


def redispatch(
    name: str,
    *,
    time_s: float = 1.0,
    replica: str = "clusters/a/replicas/0",
    state: redispatch_pb2.RedispatchState.ValueType = redispatch_pb2.REDISPATCH_STATE_DONE,
) -> RedispatchRecord:
    return RedispatchRecord(
        name=name,
        cluster=name.partition("/redispatches/")[0],
        replica=replica,
        body=redispatch_pb2.Redispatch(name=name, replica=replica),
        state=state,
        create_time_s=time_s,
    )
