"""A small cluster: a replica whose primary is on node a, with attention workers on nodes b and c."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from hetis.formats.documents import from_data
from hetis.planner.convert.documents import document_of
from hetis.planner.fleet.replica import Contents
from hetis.planner.fleet.settings import FleetSettings
from hetis.planner.store import ClusterRecord, PlanRecord, ReplicaRecord
from hetis.v1 import (
    change_pb2,
    cluster_pb2,
    document_pb2,
    head_map_pb2,
    plan_pb2,
    redispatch_pb2,
    replica_pb2,
    stage_pb2,
)
from tests.planner.fleet.memory_store import MemoryStore

CLUSTER = "clusters/lab"
PLAN = "plans/first"
REPLICA = "clusters/lab/replicas/first-0"
SETTINGS = FleetSettings(heartbeat_s=1.0, suspect_s=2.0, lease_s=5.0)
MOVED = ("r0", 1)  # request and head group that sample changes move from b to c


def shape(
    primary: Sequence[str] = ("a/0",), workers: Sequence[str] = ("b/0", "c/0"), rate: float = 1.0
) -> replica_pb2.ReplicaPlan:
    pools = [replica_pb2.AttentionWorkerPool(stage=0, gpu_type="L4", devices=workers, kv_head_groups=1)]
    return replica_pb2.ReplicaPlan(
        rate_rps=rate,
        ttft_s=1.0,
        tpot_s=0.1,
        micro_batch=8,
        in_flight=1,
        chunk_tokens=512,
        kv_tokens=1000,
        stages=[replica_pb2.StagePlan(gpu_type="H100", tp=len(primary), copies=1, num_layers=4, devices=primary)],
        attention_workers=pools if workers else [],
    )


def cluster_document(nodes: Sequence[str] = ("a", "b", "c")) -> document_pb2.Document:
    groups = [{"name": node, "gpus": [{"type": "L4", "count": 1}]} for node in nodes]
    data = {
        "apiVersion": "hetis/v1",
        "kind": "Cluster",
        "name": "lab",
        "nodes": groups,
        "network": {"bandwidth": "100Gbps", "latency": "20us"},
    }
    return document_of(from_data(data))


def replica_record(
    name: str = REPLICA, plan: str = PLAN, index: int = 0, its: replica_pb2.ReplicaPlan | None = None
) -> ReplicaRecord:
    its = its or shape()
    body = replica_pb2.Replica(name=name, plan=plan, plan_index=index, shape=its, primary_node="a")
    return ReplicaRecord(
        name=name,
        cluster=CLUSTER,
        plan=plan,
        body=body,
        state=replica_pb2.REPLICA_STATE_STARTING,
    )


def plan_record(
    name: str = PLAN, activation: plan_pb2.ActivationState.ValueType = plan_pb2.ACTIVATION_STATE_ACTIVATING
) -> PlanRecord:
    return PlanRecord(
        name=name,
        cluster=CLUSTER,
        body=plan_pb2.Plan(name=name, cluster=CLUSTER),
        state=plan_pb2.PLAN_STATE_READY,
        activation=activation,
        create_time_s=1.0,
    )


def cluster_record(plan: str = PLAN, document: document_pb2.Document | None = None) -> ClusterRecord:
    return ClusterRecord(
        name=CLUSTER,
        body=cluster_pb2.Cluster(name=CLUSTER, document=document),
        active_plan=plan,
        create_time_s=1.0,
        update_time_s=1.0,
    )


def store_with_plan(document: document_pb2.Document | None = None) -> MemoryStore:
    """Return a store in which a plan of one replica has just been activated."""
    store = MemoryStore()
    store.tables.clusters.insert(cluster_record(document=document))
    store.tables.plans.insert(plan_record())
    store.tables.replicas.insert(replica_record())
    return store


def contents() -> Contents:
    return Contents(
        model=document_pb2.Document(content=b"{}"),
        stages=(stage_pb2.StageModel(stage=0, copy=0, num_layers=4),),
        kv_partners=(replica_pb2.KvPartner(role=replica_pb2.REPLICA_ROLE_PREFILL, gpu_types=["T4"], tp=1),),
    )


class SampleContents:
    """Return contents in which every replica of every plan can be read."""

    async def contents(self, plan: str, indices: Sequence[int]) -> list[Contents | None]:
        return [contents() for _ in indices]


def change(base_generation: int, *, source: str = "b/0", target: str = "c/0") -> redispatch_pb2.Redispatch:
    """Return a change that moves one head group."""
    change_id = str(uuid.uuid4())
    move = head_map_pb2.Move(
        number=0,
        request=MOVED[0],
        head_groups=[MOVED[1]],
        source=source,
        target=target,
        reason=head_map_pb2.MOVE_REASON_BALANCE,
    )
    body = redispatch_pb2.Redispatch(
        name=f"{CLUSTER}/redispatches/{change_id}",
        replica=REPLICA,
        num_moves=1,
        change=change_pb2.Change(change_id=change_id, replica=REPLICA, base_generation=base_generation, moves=[move]),
    )
    body.change.prepare_timeout.seconds = 30
    return body
