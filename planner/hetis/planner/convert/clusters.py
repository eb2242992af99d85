"""Clusters, nodes, replicas and re-dispatches as callers see them: stored records combined with live state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hetis.planner.convert import documents
from hetis.planner.convert.names import optional_timestamp, timestamp
from hetis.planner.store import ClusterRecord, NodeRecord, RedispatchRecord, ReplicaRecord, etag_of
from hetis.solver.cluster import Cluster
from hetis.v1 import cluster_pb2, document_pb2, redispatch_pb2, replica_pb2, report_pb2, view_pb2

BASIC = view_pb2.VIEW_BASIC
FULL = view_pb2.VIEW_FULL


def cluster_body(
    name: str, document: document_pb2.Document, value: Cluster, policy: cluster_pb2.ClusterPolicy | None
) -> cluster_pb2.Cluster:
    """Return the stored body of a cluster. ``document`` is canonical, and ``value`` is its content."""
    return cluster_pb2.Cluster(
        name=name,
        document=document,
        policy=policy,
        num_nodes=sum(group.count for group in value.node_groups),
        num_gpus=value.num_gpus(),
    )


def cluster_document(source: document_pb2.Document) -> tuple[document_pb2.Document, Cluster]:
    """Return the canonical document of a cluster, and its content. Raises as `documents.read_document`."""
    value = documents.read_cluster(source)
    return documents.document_of(value, source_name=source.source_name, text=source.content), value


def cluster_message(record: ClusterRecord, *, view: view_pb2.View.ValueType, num_connected: int) -> cluster_pb2.Cluster:
    message = cluster_pb2.Cluster()
    message.CopyFrom(record.body)
    if view == BASIC:
        message.document.ClearField("content")
        message.document.ClearField("text")
    message.etag = etag_of(record)
    message.num_connected_nodes = num_connected
    message.active_plan = record.active_plan
    message.earlier_plan = record.earlier_plan
    message.create_time.CopyFrom(timestamp(record.create_time_s))
    message.update_time.CopyFrom(timestamp(record.update_time_s))
    return message


def node_message(
    name: str,
    *,
    view: view_pb2.View.ValueType,
    state: cluster_pb2.NodeState.ValueType,
    record: NodeRecord | None,
    devices: Sequence[report_pb2.DeviceReport],
    replicas: Iterable[str],
    connect_time_s: float | None,
    heard_time_s: float | None,
) -> cluster_pb2.Node:
    """Return a node; times that are None are taken from its record, which is from an earlier term."""
    message = cluster_pb2.Node()
    if record is not None:
        message.CopyFrom(record.body)
        message.draining = record.draining
    message.name = name
    message.state = state
    message.etag = etag_of(record)
    for field, items in (("devices", devices), ("replicas", replicas)):
        message.ClearField(field)  # type: ignore[arg-type]
        getattr(message, field).extend(items)
    if (time := optional_timestamp(connect_time_s)) is not None:
        message.connect_time.CopyFrom(time)
    if (time := optional_timestamp(heard_time_s)) is not None:
        message.heard_time.CopyFrom(time)
    if view == BASIC:
        message.ClearField("inventory")
    return message


def replica_message(
    record: ReplicaRecord,
    *,
    view: view_pb2.View.ValueType,
    state: replica_pb2.ReplicaState.ValueType,
    generation: int,
    report: report_pb2.ReplicaReport | None,
    report_time_s: float | None,
    redispatch: str,
) -> replica_pb2.Replica:
    """Return a replica, with its primary's report."""
    message = replica_pb2.Replica()
    message.CopyFrom(record.body)
    message.name, message.plan = record.name, record.plan
    message.state = state
    message.generation = generation
    message.redispatch = redispatch
    if report is not None:
        message.report.CopyFrom(report)
    if (time := optional_timestamp(report_time_s)) is not None:
        message.report_time.CopyFrom(time)
    return basic_replica(message) if view == BASIC else message


def redispatch_message(record: RedispatchRecord, *, view: view_pb2.View.ValueType) -> redispatch_pb2.Redispatch:
    message = redispatch_pb2.Redispatch()
    message.CopyFrom(record.body)
    message.name, message.replica, message.state = record.name, record.replica, record.state
    return basic_redispatch(message) if view == BASIC else message


def basic_replica(message: replica_pb2.Replica) -> replica_pb2.Replica:
    """Return a replica in the view BASIC."""
    short = replica_pb2.Replica()
    short.CopyFrom(message)
    short.ClearField("shape")
    return short


def basic_redispatch(message: redispatch_pb2.Redispatch) -> redispatch_pb2.Redispatch:
    """Return a re-dispatch in the view BASIC."""
    short = redispatch_pb2.Redispatch()
    short.CopyFrom(message)
    short.ClearField("change")
    return short
