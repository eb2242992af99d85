"""Snapshots of the fleet for callers and watchers, and their publication, at a limited rate for frequent changes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

from hetis.planner.convert.clusters import basic_redispatch, basic_view
from hetis.planner.convert.names import last_part, timestamp
from hetis.planner.fleet.cluster import ClusterFleet
from hetis.planner.fleet.deciding import parts_of
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.replica import Replica
from hetis.solver.cluster import node_of
from hetis.v1 import cluster_pb2, inventory_pb2, redispatch_pb2, replica_pb2, report_pb2, stage_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveNode:
    """A node as reported on its stream. Times are Unix times in seconds; None: never."""

    state: cluster_pb2.NodeState.ValueType
    is_draining: bool  # whether the node is to be emptied
    replicas: Sequence[str]  # names of the replicas that have GPUs there, until they are stopped
    devices: tuple[report_pb2.DeviceReport, ...]  # last report of each GPU
    inventory: inventory_pb2.NodeInventory | None  # what the agent found on the node; None: unknown
    agent_version: str  # version of the last connected agent; empty: there was none
    engine_address: str  # where the node's engine listens for its peers; empty: unknown
    connect_time_s: float | None
    heard_time_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveReplica:
    """A replica as reported by its nodes."""

    name: str  # `clusters/{cluster}/replicas/{replica}`
    plan: str  # the plan to which it belongs
    state: replica_pb2.ReplicaState.ValueType
    generation: int  # as reported by its primary, or else that of its last assignment
    primary_node: str
    shape: replica_pb2.ReplicaPlan  # its shape in the plan
    stages: Sequence[stage_pb2.StageModel]  # models for its dispatcher; empty: not read yet, or a prefill replica
    conditions: Mapping[str, report_pb2.DeviceStatus.ValueType]  # by GPU, as `node/index`; unlisted GPUs are OK
    report: report_pb2.ReplicaReport | None  # last report of its primary; None: none yet
    report_time_s: float | None  # Unix time of that report; None: never
    redispatch: str  # name of the re-dispatch under way; empty: none


class FleetObserver:
    """A receiver of the fleet's events, called in its event loop. Methods must return at once, and do nothing here."""

    def replica_reported(self, replica: str, report: report_pb2.ReplicaReport) -> None:
        """Called after a report from one of the replica's nodes, the primary's or another."""

    def replica_changed(self, replica: str) -> None:
        """Called after a change of a replica's state, generation or conditions, and when it is gone."""

    def redispatch_ended(self, redispatch: redispatch_pb2.Redispatch) -> None:
        """Called when a re-dispatch is final and stored."""

    def capacity_changed(self, cluster: str) -> None:
        """Called when a node was lost, came back, drains, or joined."""


class Clock:
    """The clocks of this machine: monotonic seconds, and Unix time."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()


def publish(cluster: ClusterFleet, hubs: Hubs, *, now_s: float) -> None:
    """Publish everything that has changed since the last call. ``now_s``: Unix time."""
    shown = cluster.pending.take_views()
    if not shown:
        return
    hub = hubs.cluster(cluster.name)
    for kind, name in sorted(shown, key=lambda one: one[0] == "redispatch"):  # after the replicas that name them
        if kind == "node":
            # Publish only the node's name: watchers read its state when they are ready for it.
            is_gone = last_part(name) not in cluster.leases
            hub.publish((kind, name), None if is_gone else cluster_pb2.Node(name=name), now_s=now_s)
        elif kind == "replica":
            replica = cluster.replicas.get(name)
            hub.publish((kind, name), None if replica is None else replica_view(cluster, replica), now_s=now_s)
        elif kind == "plan" and cluster.plan is not None and cluster.plan.name == name:
            plan = basic_view(cluster.plan)
            plan.activation_progress.CopyFrom(cluster.progress)
            hubs.plans.publish(name, plan, now_s=now_s)
        elif kind == "cluster" and cluster.record is not None:
            hubs.publish_cluster(cluster.record, num_connected=cluster.leases.num_connected, now_s=now_s)
        elif kind == "redispatch" and (change := cluster.changes.under_way.get(last_part(name))) is not None:
            hub.publish((kind, name), basic_redispatch(change.body), now_s=now_s)


def publish_end(
    cluster: ClusterFleet, hubs: Hubs, body: redispatch_pb2.Redispatch, *, ended_s: float, now_s: float
) -> None:
    """Publish a re-dispatch in its final state; ``ended_s`` is the end time in the store."""
    message = basic_redispatch(body)
    if not message.HasField("end_time"):
        message.end_time.CopyFrom(timestamp(ended_s))
    hubs.cluster(cluster.name).publish(("redispatch", body.name), message, now_s=now_s)


def replica_view(cluster: ClusterFleet, replica: Replica) -> replica_pb2.Replica:
    """Return a replica in the view BASIC."""
    message = deepcopy(replica.basic_body)
    message.plan = replica.record.plan
    show_live(message, live_replica(cluster, replica))
    return message


def show_live(message: replica_pb2.Replica, live: LiveReplica) -> None:
    """Add the live state of a replica to its message."""
    message.state, message.generation, message.redispatch = live.state, live.generation, live.redispatch
    if live.report is not None:
        message.report.CopyFrom(live.report)
    if live.report_time_s is not None:
        message.report_time.CopyFrom(timestamp(live.report_time_s))


def show_parts(message: replica_pb2.Replica, cluster: ClusterFleet, replica: Replica) -> None:
    """Add to a replica's message what is known of it on its nodes, and which replicas hold GPUs of it."""
    for node, part in parts_of(cluster, replica).items():
        shown = message.parts.add(
            node=node, node_state=part.presence, draining=part.is_draining, held_generation=part.held, state=part.state
        )
        if part.failure is not None:
            shown.failure.CopyFrom(part.failure)
    own = set(replica.devices)
    message.waits_for.extend(
        name for name, other in sorted(cluster.replicas.items()) if other is not replica and own & set(other.devices)
    )


def generation_of(cluster: ClusterFleet, replica: Replica) -> int:
    """Return a replica's generation as last reported by its primary; before any report, that of its last assignment."""
    slot = cluster.slot(replica.primary_node, replica.name)
    return slot.held if slot is not None and slot.held else replica.assigned_generation


def live_replica(cluster: ClusterFleet, replica: Replica) -> LiveReplica:
    change = cluster.changes.of(replica)
    contents = replica.contents
    return LiveReplica(
        name=replica.name,
        plan=replica.record.plan,
        state=replica.state,
        generation=generation_of(cluster, replica),
        primary_node=replica.primary_node,
        shape=replica.record.body.shape,
        stages=() if contents is None else contents.stages,
        conditions=dict(replica.standing.conditions),
        report=replica.report,
        report_time_s=replica.report_time_s,
        redispatch="" if change is None else change.body.name,
    )


def live_node(cluster: ClusterFleet, node: str, *, unix_s: float, now_s: float) -> LiveNode:
    """Return a node's view. ``unix_s`` and ``now_s`` are the same moment on both clocks."""
    link = cluster.links.get(node)
    heard_s = cluster.leases.heard_s(node)
    connect_time_s = cluster.connect_time_s.get(node)
    return LiveNode(
        state=cluster.leases.state(node),
        is_draining=cluster.node_records.is_draining(node),
        replicas=cluster.replicas_on(node),
        devices=() if link is None else link.devices,
        inventory=None if link is None else link.inventory,
        agent_version="" if link is None else link.agent_version,
        engine_address="" if link is None else link.engine_address,
        connect_time_s=connect_time_s,
        heard_time_s=None if heard_s is None or connect_time_s is None else unix_s - (now_s - heard_s),
    )


def kv_in_use(cluster: ClusterFleet) -> Iterator[tuple[str, float]]:
    """Yield devices with the share of their KV blocks in use, except those of lost nodes.

    The node's own report of a device takes precedence, since it covers all replicas on it. An engine that knows only
    the loads of its own stages reports them with the replica; then the fullest stage on a device stands for the device.
    """
    seen = set[str]()
    for node, link in list(cluster.links.items()):
        if not _is_there(cluster, node):
            continue
        for device in link.devices:
            if device.total_blocks:
                name = f"{node}/{device.index}"
                seen.add(name)
                yield name, min(1.0, device.used_blocks / device.total_blocks)
    for replica in list(cluster.replicas.values()):
        if replica.report is None or replica.is_stopping:
            continue
        fullest = dict[str, float]()
        for stage in replica.report.stages:
            for load in stage.devices:
                if load.total_blocks and load.device not in seen and _is_there(cluster, node_of(load.device)):
                    share = min(1.0, load.used_blocks / load.total_blocks)
                    fullest[load.device] = max(fullest.get(load.device, 0.0), share)
        yield from fullest.items()


def _is_there(cluster: ClusterFleet, node: str) -> bool:
    state = cluster.leases.state(node)
    return state in (cluster_pb2.NODE_STATE_READY, cluster_pb2.NODE_STATE_SUSPECT)
