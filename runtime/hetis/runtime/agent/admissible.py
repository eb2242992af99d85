"""Reasons to refuse a delta: wrong fields, the state held here, or an engine that cannot do what it asks.

The fields are checked before anything in the delta is trusted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from hetis.runtime.agent.replica_state import ChangeState, DesiredPhase, ReplicaState
from hetis.runtime.moves.refusals import failure_of, generation_mismatch
from hetis.v1.agent_service_pb2 import AgentCapability, Delta
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePart, ChangePhase
from hetis.v1.failure_pb2 import ErrorReason, Failure, FieldViolation

MOST_MOVES = 4096
LONGEST_PREPARE_S = 600
_PARTS = (ChangePart.CHANGE_PART_AUTHORITY, ChangePart.CHANGE_PART_SOURCE, ChangePart.CHANGE_PART_TARGET)
# A stored generation never decreases again, so a generation that no planner will reach must not be stored. A planner
# whose store was restored from a backup leaps ahead by at most MOST_AHEAD; one that a node hears for the first time may
# have leapt several times.
MOST_AHEAD = 1 << 32
MOST_AT_FIRST = 1 << 40


def wrong_fields(delta: Delta) -> Failure | None:
    """Return INVALID_FIELD with every field that is wrong, or None if the delta is well-formed."""
    violations = [FieldViolation(field=field, description=what) for field, what in _problems(delta)]
    if not violations:
        return None
    failure = failure_of(
        ErrorReason.ERROR_REASON_INVALID_FIELD, "; ".join(f"{v.field}: {v.description}" for v in violations)
    )
    failure.field_violations.extend(violations)
    return failure


def _problems(delta: Delta) -> Iterator[tuple[str, str]]:
    if not delta.nonce:
        yield "nonce", "is missing"
    if not delta.replica:
        yield "replica", "is missing"
    if delta.generation <= delta.base_generation:
        yield "generation", f"is {delta.generation}, must be above base_generation {delta.base_generation}"
    match delta.WhichOneof("change"):
        case None:
            yield "change", "is missing"
        case "assignment":
            if delta.assignment.replica != delta.replica:
                yield "assignment.replica", f"is {delta.assignment.replica!r}, the delta is of {delta.replica!r}"
        case "prepare":
            yield from _change_problems(delta.prepare.change, delta)
            parts = delta.prepare.parts
            if not parts or any(part not in _PARTS for part in parts):
                yield "prepare.parts", f"are {list(parts)}, must be some of authority, source and target"
        case "commit":
            if not delta.commit.change_id:
                yield "commit.change_id", "is missing"
        case "abort":
            if not delta.abort.change_id:
                yield "abort.change_id", "is missing"
        case "resolved":
            if not delta.resolved.change_id:
                yield "resolved.change_id", "is missing"
            if delta.resolved.outcome not in (
                ChangeOutcome.CHANGE_OUTCOME_FLIPPED,
                ChangeOutcome.CHANGE_OUTCOME_ABORTED,
            ):
                yield "resolved.outcome", f"is {delta.resolved.outcome}, must be FLIPPED or ABORTED"


def _change_problems(change: Change, delta: Delta) -> Iterator[tuple[str, str]]:
    if not change.change_id:
        yield "prepare.change.change_id", "is missing"
    if change.replica != delta.replica:
        yield "prepare.change.replica", f"is {change.replica!r}, the delta is of {delta.replica!r}"
    if change.generation <= change.base_generation:
        yield "prepare.change.generation", f"is {change.generation}, must be above {change.base_generation}"
    if not 1 <= len(change.moves) <= MOST_MOVES:
        yield "prepare.change.moves", f"are {len(change.moves)}, must be 1 to {MOST_MOVES}"
    timeout_s = change.prepare_timeout.seconds + change.prepare_timeout.nanos / 1e9
    if not 0 < timeout_s <= LONGEST_PREPARE_S:
        yield "prepare.change.prepare_timeout", f"is {timeout_s} s, must be above 0 and at most {LONGEST_PREPARE_S} s"


def refusal_of(delta: Delta, held: ReplicaState, can: Collection[AgentCapability.ValueType]) -> Failure | None:
    """Return why the delta cannot be accepted, or None if it can."""
    kind = delta.WhichOneof("change")
    if delta.generation > (held.generation + MOST_AHEAD if held.generation else MOST_AT_FIRST):
        return _too_far_ahead(delta, held)
    if kind in ("assignment", "removal"):
        return _assignment_refusal(delta, held)
    if AgentCapability.AGENT_CAPABILITY_MOVE not in can:
        return failure_of(ErrorReason.ERROR_REASON_ENGINE_CANNOT, "the engine of this node moves no head groups")
    if kind == "prepare":
        return _prepare_refusal(delta, held)
    if kind == "commit":
        return _commit_refusal(delta, held)
    if kind == "resolved":
        change = held.changes.get(delta.resolved.change_id)
        if change is not None and change.is_authority and _contradicts(change, delta.resolved.outcome):
            return _wrong_phase(change, "decided otherwise")
    return None


def _assignment_refusal(delta: Delta, held: ReplicaState) -> Failure | None:
    if delta.base_generation and delta.base_generation != held.held_generation:
        return generation_mismatch(delta.base_generation, held.held_generation)
    if delta.generation > held.generation:
        return None
    same = delta.generation == held.generation and (
        delta.assignment == held.assignment if delta.HasField("assignment") else held.assignment is None
    )
    return None if same else generation_mismatch(delta.base_generation, held.generation)


def _prepare_refusal(delta: Delta, held: ReplicaState) -> Failure | None:
    known = held.changes.get(delta.prepare.change.change_id)
    if known is not None:
        return None if known.is_open and known.desired is DesiredPhase.PREPARED else _wrong_phase(known, "has ended")
    other = held.open_change
    if other is not None:
        return failure_of(
            ErrorReason.ERROR_REASON_CHANGE_IN_FLIGHT,
            f"change {other.id} of the replica is under way",
            change_id=other.id,
        )
    if held.assignment is None or delta.base_generation != held.generation:
        return generation_mismatch(delta.base_generation, held.held_generation)
    return None


def _commit_refusal(delta: Delta, held: ReplicaState) -> Failure | None:
    change = held.changes.get(delta.commit.change_id)
    if change is None:
        return failure_of(
            ErrorReason.ERROR_REASON_CHANGE_UNKNOWN,
            f"change {delta.commit.change_id} was never prepared here",
            change_id=delta.commit.change_id,
        )
    if not change.is_authority:
        return _wrong_phase(change, "is not the authority")
    return _wrong_phase(change, "is not ready") if change.phase == ChangePhase.CHANGE_PHASE_PREPARING else None


def _too_far_ahead(delta: Delta, held: ReplicaState) -> Failure:
    failure = generation_mismatch(delta.base_generation, held.held_generation)
    failure.message = (
        f"generation {delta.generation} is too far above {held.generation}, which is the newest here, to be meant"
    )
    return failure


def _contradicts(change: ChangeState, outcome: ChangeOutcome.ValueType) -> bool:
    has_flipped = change.phase in (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_RELEASED)
    return has_flipped != (outcome == ChangeOutcome.CHANGE_OUTCOME_FLIPPED)


def _wrong_phase(change: ChangeState, why: str) -> Failure:
    phase = ChangePhase.Name(change.phase).removeprefix("CHANGE_PHASE_")
    return failure_of(
        ErrorReason.ERROR_REASON_CHANGE_PHASE,
        f"change {change.id} is {phase} here and {why}",
        change_id=change.id,
        phase=phase,
    )
