"""The stored state of the fleet: read in one view of the store, written in one transaction before it is published."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TypeVar

from hetis.planner.convert.names import seconds_of, timestamp
from hetis.planner.fleet.activation import Standing
from hetis.planner.fleet.changes import Saving
from hetis.planner.fleet.replica import conditions_of
from hetis.planner.store import (
    ClusterRecord,
    NodeRecord,
    PlanRecord,
    Reader,
    RedispatchRecord,
    ReplicaRecord,
    Transaction,
)
from hetis.planner.store.records import FINAL_REDISPATCHES
from hetis.planner.store.tables import TableView
from hetis.v1 import cluster_pb2, inventory_pb2, plan_pb2, redispatch_pb2, replica_pb2

R = TypeVar("R", NodeRecord, ReplicaRecord)
RedispatchState = redispatch_pb2.RedispatchState
MOST_EVENTS = 20  # of a replica
# 0 is UNSPECIFIED
UNDER_WAY = tuple(state for state in RedispatchState.values() if state and state not in FINAL_REDISPATCHES)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCluster:
    """A stored cluster; ``plan`` is None if none is active.

    ``nodes`` and ``replicas`` are all records, or those that have changed since the cluster was last read.
    ``redispatches`` are those under way, in the first reading only.
    """

    cluster: ClusterRecord
    nodes: Sequence[NodeRecord] = ()
    replicas: Sequence[ReplicaRecord] = ()
    replica_names: Collection[str] = ()  # of all replicas
    plan: PlanRecord | None = None
    redispatches: Sequence[RedispatchRecord] = ()


def read_clusters(reader: Reader, names: Sequence[str]) -> dict[str, StoredCluster]:
    """Return the stored clusters of these names, with as many queries as for one; those that are gone are omitted."""
    clusters = reader.clusters.all(name=names)
    active = [cluster.active_plan for cluster in clusters if cluster.active_plan]
    plans = {plan.name: plan for plan in reader.plans.all(name=active)} if active else {}
    nodes, replicas, redispatches = defaultdict(list), defaultdict(list), defaultdict(list)
    for node in reader.nodes.all(cluster=names):
        nodes[node.cluster].append(node)
    for replica in reader.replicas.all(cluster=names):
        replicas[replica.cluster].append(replica)
    for redispatch in reader.redispatches.all(cluster=names, state=UNDER_WAY):
        redispatches[redispatch.cluster].append(redispatch)
    return {
        cluster.name: StoredCluster(
            cluster=cluster,
            nodes=nodes[cluster.name],
            replicas=replicas[cluster.name],
            replica_names=[replica.name for replica in replicas[cluster.name]],
            plan=plans.get(cluster.active_plan),
            redispatches=redispatches[cluster.name],
        )
        for cluster in clusters
    }


_AT_ONCE = 500  # names in a query; databases limit the parameters of a statement


def read_changes(
    reader: Reader, name: str, *, nodes: Mapping[str, int], replicas: Mapping[str, int]
) -> StoredCluster | None:
    """Return what has changed of a cluster, or None if it is gone.

    ``nodes``, ``replicas``: the versions of the records that are known, by name.
    """
    cluster = reader.clusters.get(name)
    if cluster is None:
        return None
    there = reader.replicas.versions(cluster=name)
    return StoredCluster(
        cluster=cluster,
        nodes=_changed(reader.nodes, reader.nodes.versions(cluster=name), nodes),
        replicas=_changed(reader.replicas, there, replicas),
        replica_names=there.keys(),
        plan=reader.plans.get(cluster.active_plan) if cluster.active_plan else None,
    )


def _changed(table: TableView[R], there: Mapping[str, int], known: Mapping[str, int]) -> list[R]:
    names = [name for name, version in there.items() if known.get(name) != version]
    starts = range(0, len(names), _AT_ONCE)
    return [record for start in starts for record in table.all(name=names[start : start + _AT_ONCE])]


def read_ends(reader: Reader, names: Sequence[str]) -> dict[str, redispatch_pb2.Redispatch]:
    """Return the stored re-dispatches of these names; names without a record are omitted."""
    return {record.name: record.body for record in reader.redispatches.all(name=names)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaWrite:
    """The fleet's decision about a replica of ``plan`` (empty: of none); ``is_gone``: its record must be deleted."""

    name: str
    plan: str
    standing: Standing
    generation: int
    assigned_generation: int
    is_gone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWrite:
    """An agent's report about its node. None or empty fields: nothing new."""

    name: str
    inventory: inventory_pb2.NodeInventory | None
    agent_version: str
    engine_address: str
    connect_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanWrite:
    """The progress of the active plan."""

    name: str
    activation: plan_pb2.ActivationState.ValueType
    progress: plan_pb2.ActivationProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class Writes:
    """All writes from one decision about a cluster."""

    cluster: str
    replicas: Sequence[ReplicaWrite] = ()
    nodes: Sequence[NodeWrite] = ()
    unneeded_nodes: Sequence[str] = ()  # names of nodes whose records must be deleted
    plan: PlanWrite | None = None
    redispatches: Sequence[Saving] = ()

    def __bool__(self) -> bool:
        return bool(self.replicas or self.nodes or self.unneeded_nodes or self.plan or self.redispatches)


@dataclass(slots=True, kw_only=True)
class WriteResult:
    """The records after `apply`; replicas that other calls removed in the meantime are missing.

    ``moved``: replicas that other calls gave to another plan in the meantime. The decision about them was not written;
    the cluster decides again once it has read their records.
    """

    replicas: dict[str, ReplicaRecord] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    nodes: dict[str, NodeRecord] = field(default_factory=dict)
    unneeded_nodes: list[str] = field(default_factory=list)  # names of nodes that have no record any more
    plan: PlanRecord | None = None


def apply(tx: Transaction, writes: Writes, *, now_s: float) -> WriteResult:
    """Write everything at ``now_s``, Unix time.

    Only the fleet's own fields are written, since other calls change the same records.
    """
    kept = WriteResult()
    for one in writes.replicas:
        _apply_replica(tx, one, kept, now_s)
    for node in writes.nodes:
        _apply_node(tx, writes.cluster, node, kept)
    for name in writes.unneeded_nodes:
        _delete_node(tx, name, kept)
    for saving in writes.redispatches:
        _apply_redispatch(tx, writes.cluster, saving.body, now_s)
    if writes.plan is not None:
        _apply_plan(tx, writes.cluster, writes.plan, kept)
    return kept


def _apply_replica(tx: Transaction, write: ReplicaWrite, kept: WriteResult, now_s: float) -> None:
    record = tx.replicas.get(write.name)
    if record is None:
        return
    if record.plan != write.plan:
        kept.moved.add(write.name)
        return
    if write.is_gone:
        tx.replicas.delete(write.name)
        return
    body = deepcopy(record.body)
    body.state, body.generation = write.standing.state, write.generation
    body.assigned_generation = write.assigned_generation
    del body.conditions[:]
    body.conditions.extend(conditions_of(write.standing))
    body.ClearField("failure")
    if write.standing.failure is not None:
        body.failure.CopyFrom(write.standing.failure)
    _append_event(body, write.standing, now_s)
    kept.replicas[write.name] = tx.replicas.update(
        replace(record, body=body, state=write.standing.state, generation=write.generation)
    )


def _append_event(body: replica_pb2.Replica, standing: Standing, now_s: float) -> None:
    """Append an event, unless the newest says the same; the oldest go first."""
    event = replica_pb2.ReplicaEvent(time=timestamp(now_s), state=standing.state, failure=standing.failure)
    if standing.goal is not None:
        event.goal = standing.goal
    last = body.events[-1] if body.events else replica_pb2.ReplicaEvent(state=replica_pb2.REPLICA_STATE_STARTING)
    if (last.state, last.goal, last.failure) != (event.state, event.goal, event.failure):
        body.events.append(event)
        del body.events[:-MOST_EVENTS]


def _apply_node(tx: Transaction, cluster: str, write: NodeWrite, kept: WriteResult) -> None:
    record = tx.nodes.get(write.name)
    body = deepcopy(record.body) if record is not None else cluster_pb2.Node(name=write.name)
    if write.inventory is not None:
        body.inventory.CopyFrom(write.inventory)
    body.agent_version, body.engine_address = write.agent_version, write.engine_address
    body.connect_time.CopyFrom(timestamp(write.connect_time_s))
    if record is None:
        kept.nodes[write.name] = tx.nodes.insert(NodeRecord(name=write.name, cluster=cluster, body=body))
    else:
        kept.nodes[write.name] = tx.nodes.update(replace(record, body=body))


def _delete_node(tx: Transaction, name: str, kept: WriteResult) -> None:
    """Delete a node's record, unless the node was drained in the meantime."""
    record = tx.nodes.get(name)
    if record is not None and record.draining:
        kept.nodes[name] = record
        return
    if record is not None:
        tx.nodes.delete(name)
    kept.unneeded_nodes.append(name)


def _apply_redispatch(tx: Transaction, cluster: str, body: redispatch_pb2.Redispatch, now_s: float) -> None:
    if body.state in FINAL_REDISPATCHES and not body.HasField("end_time"):
        body.end_time.CopyFrom(timestamp(now_s))
    if (record := tx.redispatches.get(body.name)) is not None:
        tx.redispatches.update(replace(record, body=body, state=body.state))
        return
    made = RedispatchRecord(
        name=body.name,
        cluster=cluster,
        replica=body.replica,
        body=body,
        state=body.state,
        create_time_s=seconds_of(body.create_time),
    )
    tx.redispatches.insert(made)


def _apply_plan(tx: Transaction, cluster: str, write: PlanWrite, kept: WriteResult) -> None:
    of_cluster, record = tx.clusters.get(cluster), tx.plans.get(write.name)
    if of_cluster is None or of_cluster.active_plan != write.name or record is None:
        return  # another plan was activated in the meantime
    body = deepcopy(record.body)
    body.activation = write.activation
    body.activation_progress.CopyFrom(write.progress)
    kept.plan = tx.plans.update(replace(record, body=body, activation=write.activation))
