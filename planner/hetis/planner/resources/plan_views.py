"""Views of a plan: its record, and the latest progress of its search."""

from __future__ import annotations

from hetis.planner.convert.plans import without_contents
from hetis.planner.convert.times import timestamp
from hetis.planner.store import PlanRecord, etag_of
from hetis.v1 import plan_pb2

SEARCHING = frozenset({plan_pb2.PLAN_STATE_QUEUED, plan_pb2.PLAN_STATE_SOLVING})
IN_FORCE = frozenset({plan_pb2.ACTIVATION_STATE_ACTIVATING, plan_pb2.ACTIVATION_STATE_ACTIVE})


def full_view(record: PlanRecord, progress: plan_pb2.SolveProgress | None = None) -> plan_pb2.Plan:
    """Return all but replicas and prices, which only the plan's document has.

    ``progress`` is newer than the record's.
    """
    plan = plan_pb2.Plan()
    plan.CopyFrom(record.body)
    plan.name, plan.cluster = record.name, record.cluster
    plan.state, plan.activation = record.state, record.activation
    plan.etag = etag_of(record)
    plan.create_time.CopyFrom(timestamp(record.create_time_s))
    if progress is not None:
        plan.progress.CopyFrom(progress)
    return plan


def basic_view(record: PlanRecord, progress: plan_pb2.SolveProgress | None = None) -> plan_pb2.Plan:
    return without_contents(full_view(record, progress))


def is_settled(plan: plan_pb2.Plan) -> bool:
    """Return whether the plan can no longer change without a call: no search, nothing that comes up or drains."""
    if plan.state in SEARCHING or plan.activation == plan_pb2.ACTIVATION_STATE_ACTIVATING:
        return False
    if plan.activation == plan_pb2.ACTIVATION_STATE_INACTIVE:
        return True
    return not plan.activation_progress.num_draining and not plan.activation_progress.num_starting
