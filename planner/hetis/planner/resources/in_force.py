"""Plans in force: how a change is published, and how one is withdrawn that nothing serves and that has no way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hetis.planner.convert.clusters import basic_view
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.store import ClusterRecord, PlanRecord, Reader, Store, Transaction
from hetis.v1 import plan_pb2, replica_pb2

_IN_USE = (
    replica_pb2.REPLICA_STATE_SERVING,
    replica_pb2.REPLICA_STATE_DEGRADED,
    replica_pb2.REPLICA_STATE_DRAINING,
)


IN_FORCE = frozenset({plan_pb2.ACTIVATION_STATE_ACTIVATING, plan_pb2.ACTIVATION_STATE_ACTIVE})


async def publish_change(
    store: Store, hubs: Hubs, fleet: LiveFleet, cluster: ClusterRecord, plans: Sequence[PlanRecord]
) -> None:
    """Publish which plan of a cluster is in force, with all plans that changed, and pass it to the fleet."""
    now_s = store.clock()
    for plan in plans:
        hubs.plans.publish(plan.name, basic_view(plan), now_s=now_s)
    hubs.publish_cluster(cluster, num_connected=fleet.num_connected(cluster.name), now_s=now_s)
    await fleet.cluster_changed(cluster.name)


def is_withdrawable(reader: Reader, plan: PlanRecord) -> bool:
    """Return whether the plan's activation can be withdrawn.

    There is no earlier plan to go back to, and no replica of the cluster serves or drains: the plan has not come up, or
    all its nodes are gone.
    """
    cluster = reader.clusters.get(plan.cluster)
    if cluster is None or cluster.active_plan != plan.name or cluster.earlier_plan:
        return False
    return not reader.replicas.page(None, 1, cluster=cluster.name, state=_IN_USE)


def how_to_withdraw(reader: Reader, plan: PlanRecord) -> str:
    """Return the end of an error message that names the way out, empty if the activation cannot be withdrawn."""
    return ": CancelPlan withdraws its activation, since nothing serves" if is_withdrawable(reader, plan) else ""


def withdraw(tx: Transaction, plan: PlanRecord) -> tuple[ClusterRecord, PlanRecord]:
    """Take a plan out of force, whose `is_withdrawable` holds; its replicas stop, since no plan contains them."""
    cluster = tx.clusters.require(plan.cluster)
    for record in tx.replicas.all(cluster=cluster.name):
        if record.plan:
            record.body.ClearField("plan")
            tx.replicas.update(replace(record, plan=""))
    return tx.clusters.update(replace(cluster, active_plan="")), tx.plans.update(past(plan))


def past(plan: PlanRecord) -> PlanRecord:
    """Return the record of a plan that is not in force any more."""
    plan.body.activation_progress.CopyFrom(plan_pb2.ActivationProgress())
    return replace(plan, activation=plan_pb2.ACTIVATION_STATE_INACTIVE)
