"""Checks of a delta's fields, made before anything in it is trusted."""

from __future__ import annotations

from collections.abc import Iterator

from hetis.runtime.executor.refusals import failure_of
from hetis.v1.agent_service_pb2 import Delta
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePart
from hetis.v1.failure_pb2 import ErrorReason, Failure, FieldViolation

MOST_MOVES = 4096
LONGEST_PREPARE_S = 600


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


_PARTS = (ChangePart.CHANGE_PART_AUTHORITY, ChangePart.CHANGE_PART_SOURCE, ChangePart.CHANGE_PART_TARGET)


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
