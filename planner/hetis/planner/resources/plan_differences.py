"""The differences between two plans, and how much each replica loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from hetis.planner.convert.replicas import replica_to_proto
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.use_cases.sources import ENGINE_SETTINGS, PlanAndProblem
from hetis.solver.plan import Plan, ReplicaPlan
from hetis.v1 import plan_service_pb2 as pb2

MOST_BYTES = (4 << 20) - (16 << 10)  # in the answer
_Kind = pb2.ReplicaDifferenceKind
_SETTINGS = ("roles", "engine", ENGINE_SETTINGS, "seed", "threads", "gap_target", "time_limit_s")
_LIMITS = ("role", "micro_batch", "in_flight", "chunk_tokens", "kv_tokens")


def compare(one: PlanAndProblem, other: PlanAndProblem) -> pb2.DiffPlansResponse:
    """Return the differences. Slow for large plans: not for an event loop.

    Raises:
        ServiceError: MESSAGE_TOO_LARGE.
    """
    response = pb2.DiffPlansResponse(
        replicas=_differences(one, other),
        freed_devices=sorted(_devices(one.plan) - _devices(other.plan)),
        taken_devices=sorted(_devices(other.plan) - _devices(one.plan)),
        value=one.plan.result.value,
        other_value=other.plan.result.value,
        unit=one.plan.result.unit,
        other_unit=other.plan.result.unit,
        changed_inputs=sorted(_changed_inputs(one.plan, other.plan)),
    )
    load_bytes = load_bytes_of(other)
    added = (d for d in response.replicas if d.kind == _Kind.REPLICA_DIFFERENCE_KIND_ADDED)
    response.load_bytes = sum(load_bytes(other.plan.replicas[difference.other_index]) for difference in added)
    if response.ByteSize() > MOST_BYTES:
        raise ServiceError(
            Reason.ERROR_REASON_MESSAGE_TOO_LARGE,
            f"the differences take {response.ByteSize()} bytes, a message has {MOST_BYTES} for them;"
            " ReadPlanDocument gives both plans to compare",
            metadata={"max_bytes": MOST_BYTES},
        )
    return response


def _differences(one: PlanAndProblem, other: PlanAndProblem) -> Iterator[pb2.ReplicaDifference]:
    """Yield the differences of the first plan's replicas in order, then the added ones.

    No replica is kept if the model changes.
    """
    first, second = one.plan.replicas, other.plan.replicas
    is_same_model = one.problem.model == other.problem.model
    by_devices = {_dense(replica): index for index, replica in enumerate(second)} if is_same_model else {}
    matched = set[int]()
    for index, replica in enumerate(first):
        other_index = by_devices.get(_dense(replica))
        if other_index is None:
            yield pb2.ReplicaDifference(
                kind=_Kind.REPLICA_DIFFERENCE_KIND_REMOVED, index=index, replica=replica_to_proto(replica)
            )
            continue
        matched.add(other_index)
        now = second[other_index]
        difference = pb2.ReplicaDifference(
            kind=_Kind.REPLICA_DIFFERENCE_KIND_KEPT,
            index=index,
            other_index=other_index,
            replica=replica_to_proto(replica),
        )
        if _without_predictions(replica) != _without_predictions(now):
            difference.kind = _Kind.REPLICA_DIFFERENCE_KIND_CHANGED
            difference.other_replica.CopyFrom(replica_to_proto(now))
            difference.changes.extend(_changes(replica, now))
        yield difference
    for index, replica in enumerate(second):
        if index not in matched:
            yield pb2.ReplicaDifference(
                kind=_Kind.REPLICA_DIFFERENCE_KIND_ADDED,
                other_index=index,
                other_replica=replica_to_proto(replica),
            )


def _dense(replica: ReplicaPlan) -> tuple[object, ...]:
    """Return the placement of weights on GPUs."""
    stages = tuple((s.gpu, s.tp, s.copies, s.first_layer, s.num_layers, s.devices) for s in replica.stages)
    return replica.expert_parallel, *stages


def _without_predictions(replica: ReplicaPlan) -> ReplicaPlan:
    """Return the replica without rate and latencies, which follow from the workload and do not affect an engine."""
    return replace(replica, rate=0.0, ttft_s=0.0, tpot_s=0.0)


def _changes(before: ReplicaPlan, after: ReplicaPlan) -> Iterator[str]:
    if before.kv_zones != after.kv_zones:
        yield f"sends KV to {_zones(after)} instead of {_zones(before)}"
    for name in _LIMITS:
        if (old := getattr(before, name)) != (new := getattr(after, name)):
            yield f"{name} is {new} instead of {old}"
    for number in range(len(before.stages)):
        old_workers, new_workers = _workers(before, number), _workers(after, number)
        if old_workers != new_workers:
            yield f"stage {number} has {new_workers} instead of {old_workers}"
        old, new = before.stages[number].kv_head_groups_kept, after.stages[number].kv_head_groups_kept
        if old != new:
            yield f"stage {number} keeps {new} head groups per rank instead of {old}"


def _zones(replica: ReplicaPlan) -> str:
    return ", ".join(replica.kv_zones) or "nobody"


def _workers(replica: ReplicaPlan, stage: int) -> str:
    pools = [f"{p.gpu} {', '.join(p.devices)}" for p in replica.attention_workers if p.stage == stage]
    return f"attention workers {'; '.join(pools)}" if pools else "no attention workers"


def _devices(plan: Plan) -> set[str]:
    return {device for replica in plan.replicas for device in replica.devices()}


def _changed_inputs(one: Plan, other: Plan) -> Iterator[str]:
    if one.strategy != other.strategy:
        yield "strategy"
    limits, other_limits = asdict(one.objective), asdict(other.objective)
    yield from (f"objective.{name}" for name in limits if limits[name] != other_limits[name])
    yield from (name for name in _SETTINGS if one.inputs.get(name) != other.inputs.get(name))
    digests, other_digests = _digests(one.inputs), _digests(other.inputs)
    for path in digests.keys() | other_digests.keys():
        if digests.get(path) != other_digests.get(path):
            yield f"documents.{path}"


def _digests(inputs: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in dict(inputs.get("digests") or {}).items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": str(digest) for inner, digest in value.items()}
        else:
            found[name] = str(value)
    return found


def load_bytes_of(found: PlanAndProblem) -> Callable[[ReplicaPlan], int]:
    """Return a function for the bytes that a replica of this plan loads; equal shapes are computed once."""
    from hetis.solver.placement.explanation.replica_view import replica_views

    known: dict[tuple[object, ...], int] = {}

    def load_bytes(replica: ReplicaPlan) -> int:
        shape = _shape(replica)
        if shape not in known:
            views = replica_views(replace(found.plan, replicas=(replica,)), found.problem)
            known[shape] = sum(bar.num_devices * bar.weight_bytes for view in views for bar in view.memory())
        return known[shape]

    return load_bytes


def _shape(replica: ReplicaPlan) -> tuple[object, ...]:
    """Return what determines the weights: layers and GPU types, but not the names of GPUs."""
    return tuple((s.gpu, s.tp, s.copies, s.first_layer, s.num_layers) for s in replica.stages)
