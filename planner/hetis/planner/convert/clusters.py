"""Clusters, profiles, plans, replicas and re-dispatches as callers see them: records together with live state."""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

from google.protobuf.message import Message

from hetis.planner.convert.names import timestamp
from hetis.planner.convert.plans import without_contents
from hetis.planner.store import ClusterRecord, PlanRecord, ProfileRecord, RedispatchRecord, etag_of
from hetis.v1 import cluster_pb2, plan_pb2, profile_pb2, redispatch_pb2, replica_pb2, view_pb2

M = TypeVar("M", bound=Message)
D = TypeVar("D", cluster_pb2.Cluster, profile_pb2.Profile)
BASIC = view_pb2.VIEW_BASIC
FULL = view_pb2.VIEW_FULL


def cluster_message(record: ClusterRecord, *, view: view_pb2.View.ValueType, num_connected: int) -> cluster_pb2.Cluster:
    message = _described(record.body, record, view)
    message.num_connected_nodes = num_connected
    message.active_plan, message.earlier_plan = record.active_plan, record.earlier_plan
    return message


def profile_message(record: ProfileRecord, *, view: view_pb2.View.ValueType) -> profile_pb2.Profile:
    return _described(record.body, record, view)


def _described(body: D, record: ClusterRecord | ProfileRecord, view: view_pb2.View.ValueType) -> D:
    """Return a copy of the body of a cluster or profile, with the record's etag and times."""
    message = deepcopy(body)
    if view == BASIC:
        message.document.ClearField("content")
        message.document.ClearField("text")
    message.etag = etag_of(record)
    message.create_time.CopyFrom(timestamp(record.create_time_s))
    message.update_time.CopyFrom(timestamp(record.update_time_s))
    return message


def redispatch_message(record: RedispatchRecord, *, view: view_pb2.View.ValueType) -> redispatch_pb2.Redispatch:
    message = deepcopy(record.body)
    message.name, message.replica, message.state = record.name, record.replica, record.state
    return basic_redispatch(message) if view == BASIC else message


def basic_replica(message: replica_pb2.Replica) -> replica_pb2.Replica:
    short = without(message, "shape", "parts", "waits_for")
    del short.events[:-1]
    return short


def basic_redispatch(message: redispatch_pb2.Redispatch) -> redispatch_pb2.Redispatch:
    return without(message, "change")


def without(message: M, *fields: str) -> M:
    """Return a copy of a message without these fields."""
    short = deepcopy(message)
    for field in fields:
        short.ClearField(field)
    return short


def full_view(record: PlanRecord, progress: plan_pb2.SolveProgress | None = None) -> plan_pb2.Plan:
    """Return the plan without replicas and prices, which only its document has.

    ``progress``: newer than the record's.
    """
    plan = deepcopy(record.body)
    plan.name, plan.cluster = record.name, record.cluster
    plan.state, plan.activation = record.state, record.activation
    plan.etag = etag_of(record)
    plan.create_time.CopyFrom(timestamp(record.create_time_s))
    if progress is not None:
        plan.progress.CopyFrom(progress)
    return plan


def basic_view(record: PlanRecord, progress: plan_pb2.SolveProgress | None = None) -> plan_pb2.Plan:
    return without_contents(full_view(record, progress))
