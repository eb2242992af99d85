"""The demo's calls of the planner: activate the plan, and report the outcome of re-dispatches."""

from __future__ import annotations

import uuid
from pathlib import Path

from google.protobuf.duration_pb2 import Duration

from hetis.planner.client import Client, document_of_file
from hetis.v1 import (
    cluster_pb2,
    cluster_service_pb2,
    document_pb2,
    plan_pb2,
    plan_service_pb2,
    redispatch_pb2,
    replica_pb2,
)

CLUSTER, PLAN = "clusters/demo", "plans/demo"
HERE = Path(__file__).parent
HIGH_WATER = 0.5  # share of a device's KV above which heads leave; low, so that there is something to see


class Planner:
    """Client of the planner at ``address``."""

    def __init__(self, address: str) -> None:
        self._client = Client(address)

    def close(self) -> None:
        self._client.close()

    def create_cluster(self) -> None:
        policy = cluster_pb2.ClusterPolicy(
            redispatch=cluster_pb2.REACTION_MODE_AUTOMATIC,
            redispatch_interval=Duration(nanos=500_000_000),
            high_water=HIGH_WATER,
        )
        self._client.clusters.CreateCluster(
            cluster_service_pb2.CreateClusterRequest(
                cluster_id="demo",
                cluster=cluster_pb2.Cluster(
                    document=document_of_file(HERE / "cluster.yaml", document_pb2.DOCUMENT_KIND_CLUSTER),
                    policy=policy,
                ),
            )
        )

    def is_agent_ready(self) -> bool:
        return any(self._client.list_nodes(CLUSTER, states=[cluster_pb2.NODE_STATE_READY]))

    def put_in_force(self) -> None:
        """Activate the plan of ``plan.json``, which the planner checks."""
        imported = document_of_file(HERE / "plan.json", document_pb2.DOCUMENT_KIND_PLAN)
        plan = plan_pb2.Plan(cluster=CLUSTER, imported=imported)
        self._client.plans.CreatePlan(
            plan_service_pb2.CreatePlanRequest(plan_id="demo", plan=plan, request_id=str(uuid.uuid4()))
        )
        self._client.wait(PLAN)
        self._client.plans.ActivatePlan(plan_service_pb2.ActivatePlanRequest(name=PLAN))

    def is_serving(self) -> bool:
        """Return whether the replica is active with all its devices."""
        replicas = list(self._client.list_replicas(CLUSTER))
        return bool(replicas) and all(r.state == replica_pb2.REPLICA_STATE_SERVING for r in replicas)

    def replica(self) -> str:
        """Return the name of the only replica."""
        (found,) = self._client.list_replicas(CLUSTER)
        return str(found.name)

    def redispatches(self) -> list[redispatch_pb2.Redispatch]:
        """Return the re-dispatches that moved something, in order."""
        done = redispatch_pb2.REDISPATCH_STATE_DONE
        found = [one for one in self._client.list_redispatches(CLUSTER) if one.state == done]
        return sorted(found, key=lambda one: one.create_time.ToNanoseconds())


def told(redispatch: redispatch_pb2.Redispatch) -> str:
    """Return a sentence about the trigger, the moves and the duration."""
    first = redispatch.triggers[0]
    kind = redispatch_pb2.TriggerKind.Name(first.kind).removeprefix("TRIGGER_KIND_").lower().replace("_", " ")
    why = f"{kind} of {first.device}" if first.device else kind
    if first.limit:
        why += f" ({first.value:.0%}, limit {first.limit:.0%})"
    took_s = (redispatch.end_time.ToNanoseconds() - redispatch.create_time.ToNanoseconds()) / 1e9
    moves = "1 move" if redispatch.num_moves == 1 else f"{redispatch.num_moves} moves"
    return f"{why}: {moves}, {redispatch.kv_bytes / 1024:.0f} KiB, {took_s * 1e3:.0f} ms"
