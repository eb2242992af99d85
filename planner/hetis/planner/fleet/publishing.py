"""Updates for watchers about the fleet; of frequent changes they get the latest state, at a limited rate."""

from __future__ import annotations

from hetis.planner.convert.clusters import BASIC, basic_redispatch, cluster_message
from hetis.planner.convert.names import optional_timestamp, timestamp
from hetis.planner.convert.plans import without_contents
from hetis.planner.fleet.cluster import ClusterFleet
from hetis.planner.fleet.replica import Replica
from hetis.planner.fleet.views import LiveNode, LiveReplica, Publishing
from hetis.planner.store import PlanRecord, etag_of
from hetis.v1 import cluster_pb2, plan_pb2, redispatch_pb2, replica_pb2


def publish(cluster: ClusterFleet, hubs: Publishing, *, now_s: float) -> None:
    """Publish everything that has changed since the last time. ``now_s``: Unix time."""
    shown, cluster.shown = cluster.shown, set()
    if not shown:
        return
    hub = hubs.cluster(cluster.name)
    for kind, name in shown:
        if kind == "node":
            # Only the name of the node: watchers look up its state when they are ready for it.
            hub.publish((kind, name), cluster_pb2.Node(name=name), now_s=now_s)
        elif kind == "replica":
            replica = cluster.replicas.get(name)
            hub.publish((kind, name), None if replica is None else replica_view(cluster, replica), now_s=now_s)
        elif kind == "plan" and cluster.plan is not None and cluster.plan.name == name:
            hubs.plans.publish(name, plan_view(cluster, cluster.plan), now_s=now_s)
        elif kind == "cluster" and cluster.record is not None:
            message = cluster_message(cluster.record, view=BASIC, num_connected=cluster.leases.num_connected)
            hub.publish((kind, name), message, now_s=now_s)
    under_way = {change.body.name: change.body for change in cluster.changes.under_way.values()}
    for kind, name in shown:
        if kind == "redispatch" and name in under_way:
            hub.publish((kind, name), basic_redispatch(under_way[name]), now_s=now_s)


def publish_end(
    cluster: ClusterFleet, hubs: Publishing, body: redispatch_pb2.Redispatch, *, ended_s: float, now_s: float
) -> None:
    """Publish a re-dispatch in its final state; ``ended_s`` is the time in the store."""
    message = basic_redispatch(body)
    if not message.HasField("end_time"):
        message.end_time.CopyFrom(timestamp(ended_s))
    hubs.cluster(cluster.name).publish(("redispatch", body.name), message, now_s=now_s)


def plan_view(cluster: ClusterFleet, record: PlanRecord) -> plan_pb2.Plan:
    """Return the active plan in the view BASIC, with its current progress."""
    plan = without_contents(record.body)
    plan.name, plan.cluster = record.name, record.cluster
    plan.state, plan.activation = record.state, record.activation
    plan.etag = etag_of(record)
    plan.create_time.CopyFrom(timestamp(record.create_time_s))
    plan.activation_progress.CopyFrom(cluster.progress)
    return plan


def replica_view(cluster: ClusterFleet, replica: Replica) -> replica_pb2.Replica:
    """Return a replica in the view BASIC."""
    message = replica_pb2.Replica()
    message.CopyFrom(replica.basic_body)
    message.plan = replica.record.plan
    message.state, message.generation = replica.state, generation_of(cluster, replica)
    if (change := cluster.changes.of(replica)) is not None:
        message.redispatch = change.body.name
    if replica.report is not None:
        message.report.CopyFrom(replica.report)
    if (time := optional_timestamp(replica.report_time_s)) is not None:
        message.report_time.CopyFrom(time)
    return message


def generation_of(cluster: ClusterFleet, replica: Replica) -> int:
    """Return a replica's generation as last reported by its primary, or else that of its last assignment."""
    link = cluster.links.get(replica.primary_node)
    slot = None if link is None else link.slots.get(replica.name)
    return slot.held if slot is not None and slot.held else replica.assigned_generation


def live_replica(cluster: ClusterFleet, replica: Replica) -> LiveReplica:
    change = cluster.changes.of(replica)
    contents = replica.contents
    return LiveReplica(
        name=replica.name,
        cluster=cluster.name,
        plan=replica.record.plan,
        plan_index=replica.record.body.plan_index,
        state=replica.state,
        generation=generation_of(cluster, replica),
        authority=replica.record.body.authority,
        primary_node=replica.primary_node,
        shape=replica.record.body.shape,
        model=None if contents is None else contents.model,
        stages=() if contents is None else contents.stages,
        conditions=dict(replica.standing.conditions),
        report=replica.report,
        report_time_s=replica.report_time_s,
        redispatch="" if change is None else change.body.name,
    )


def live_node(cluster: ClusterFleet, node: str, name: str, *, unix_s: float, now_s: float) -> LiveNode:
    """Return a node's view. ``unix_s`` and ``now_s`` are the same moment by both clocks."""
    link = cluster.links.get(node)
    heard_s = cluster.leases.heard_s(node)
    connect_time_s = cluster.connect_time_s.get(node)
    return LiveNode(
        name=name,
        state=cluster.leases.state(node),
        is_draining=cluster.is_draining(node),
        devices=() if link is None else link.devices,
        inventory=None if link is None else link.inventory,
        agent_version="" if link is None else link.agent_version,
        capabilities=frozenset() if link is None else link.capabilities,
        connect_time_s=connect_time_s,
        heard_time_s=None if heard_s is None or connect_time_s is None else unix_s - (now_s - heard_s),
    )
