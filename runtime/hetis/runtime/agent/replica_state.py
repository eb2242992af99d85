"""The state that an agent keeps, in memory and on disk, and the deltas that it admits.

Reasons to refuse a delta are wrong fields, the state held here, or an engine that cannot do what it requests. The
fields are checked before anything in the delta is trusted.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from hetis.runtime.agent.outbox import Outbox
from hetis.runtime.moves.refusals import failure_of, generation_mismatch, phase_name
from hetis.v1.agent_service_pb2 import AgentCapability, ConnectNodeRequest, Delta
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePart, ChangePhase, ChangeStatus, MoveResult
from hetis.v1.changes import FLIPPED, NodeChange
from hetis.v1.executor_service_pb2 import CopyMovesResponse, FlipMovesResponse
from hetis.v1.failure_pb2 import ErrorReason, Failure, FieldViolation
from hetis.v1.replica_pb2 import Assignment
from hetis.v1.report_pb2 import AssignmentState

MessageT = TypeVar("MessageT", bound=Message)
NODE_PART = "node"  # part on disk for what concerns no single replica; names of replicas contain slashes
MOST_MOVES = 4096
LONGEST_PREPARE_S = 600
MOST_ENDED = 64  # ended changes that are remembered
_PARTS = (ChangePart.CHANGE_PART_AUTHORITY, ChangePart.CHANGE_PART_SOURCE, ChangePart.CHANGE_PART_TARGET)
# A stored generation never decreases again, so a generation that no planner will reach must not be stored. A planner
# whose store was restored from a backup leaps ahead by at most MOST_AHEAD; one that a node meets for the first time
# may have leapt several times.
MOST_AHEAD = 1 << 32
MOST_AT_FIRST = 1 << 40


class DamagedStateError(ValueError):
    """A part of the saved state cannot be read."""


class DesiredPhase(StrEnum):
    """The phase that a change should reach; preparing it needs no further directive."""

    PREPARED = "prepared"
    FLIPPED = "flipped"
    ABORTED = "aborted"
    RELEASED = "released"


@dataclass(slots=True, kw_only=True)
class ChangeState(NodeChange):
    """A change on this node: what the planner wants of it, and the last known progress of its `EngineChange`."""

    epoch: int  # epoch of the planner that gave the last directive
    desired: DesiredPhase = DesiredPhase.PREPARED
    why: Failure | None = None  # reason for the desired abort
    is_resolved: bool = False  # whether a ``resolved`` delta has arrived
    ended_s: float | None = None  # time at which it reached its last phase. None: it has not.
    is_reserved: bool = False  # whether the engine has answered ReserveMoves in this run of the agent
    # Whether the engine was asked to abort since the abort became desired. An assignment waits for one attempt.
    is_abort_tried: bool = False

    @property
    def is_being_prepared(self) -> bool:
        """Whether the change is open and may stay so until its deadline."""
        return self.is_open and self.desired is DesiredPhase.PREPARED

    @property
    def copies(self) -> bool:
        """Whether this node sends or receives KV in the change."""
        return any(part != ChangePart.CHANGE_PART_AUTHORITY for part in self.parts)

    # --- the planner's directives

    def take(self, delta: Delta, *, epoch: int) -> bool:
        """Take a commit, an abort or a resolution. Return whether the status must be reported now."""
        self.epoch = epoch
        kind = delta.WhichOneof("change")
        if kind == "resolved":
            self.is_resolved = True
            flipped = delta.resolved.outcome == ChangeOutcome.CHANGE_OUTCOME_FLIPPED
            if flipped and not self.has_ended:
                self.desired = DesiredPhase.RELEASED
                self.change.generation = self.change.generation or delta.generation
                del self.status.moves[:]
                self.status.moves.extend(delta.resolved.moves)
                return False
            if not flipped and self.is_open:
                why = "the authority aborted the change"
                self.want_abort(failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, why))
                return False
        elif kind == "commit" and self.phase == ChangePhase.CHANGE_PHASE_READY:
            if self.desired is DesiredPhase.PREPARED:
                self.desired = DesiredPhase.FLIPPED
            return False
        elif kind == "abort" and self.is_open:
            self.want_abort(delta.abort.failure)
            return False
        return True

    def want_abort(self, why: Failure) -> None:
        self.desired, self.why, self.is_abort_tried = DesiredPhase.ABORTED, why, False

    def revoke_commit(self) -> None:
        """Wait for another commit: the planner that permitted the flip has lost its authority."""
        self.desired = DesiredPhase.PREPARED

    # --- the engine's answers and reports

    def reserved(self, moves: Iterable[MoveResult]) -> None:
        """Record that the engine has room for all moves except those in ``moves``."""
        self.is_reserved = True
        self.leave_out(moves)

    def lost_reservation(self) -> None:
        """Reserve again with the next call: another engine may answer it."""
        self.is_reserved = False

    def abort_tried(self) -> None:
        self.is_abort_tried = True

    def copied(self, response: CopyMovesResponse) -> None:
        """Record the progress of a copy."""
        self.status.copied_bytes = max(self.status.copied_bytes, response.copied_bytes)
        self.leave_out(response.moves)

    def learn(self, said: ChangeStatus | FlipMovesResponse) -> None:
        """Record the details of the change's end. `enter` records the end itself."""
        self.leave_out(said.moves)
        self.status.step = self.status.step or said.step
        if said.HasField("failure"):
            self.why = said.failure

    def learn_generation(self, generation: int) -> None:
        """Take the generation of the flipped replica from the engine, unless it is known already."""
        self.change.generation = self.change.generation or generation

    # --- phases

    def reach(self, phase: ChangePhase.ValueType, *, generation: int, now_s: float) -> None:
        """Enter the next phase, with ``generation`` of what is held after it."""
        if self.desired is DesiredPhase.FLIPPED or (self.desired is DesiredPhase.ABORTED and phase in FLIPPED):
            self.desired = DesiredPhase.RELEASED if self.is_resolved else DesiredPhase.PREPARED
        self.enter(phase, generation=generation, failure=self.why)
        self.note_end(now_s)

    def note_end(self, now_s: float) -> None:
        """Record the time of the end, if the change has ended and none is recorded yet."""
        if self.has_ended and self.ended_s is None:
            self.ended_s = now_s


@dataclass(slots=True, kw_only=True)
class ReplicaState:
    """The state of one replica as the agent holds it."""

    replica: str  # name of the replica
    generation: int = 0  # generation of its state on this node; kept after a removal, so that nothing older is accepted
    epoch: int = 0  # epoch of the planner that sent the assignment
    assignment: Assignment | None = None  # None: it was removed, or never assigned
    nonce: str = ""  # nonce of the last delta
    answer: ConnectNodeRequest | None = None  # answer to that delta
    changes: dict[str, ChangeState] = field(default_factory=dict)  # keyed by id, in order of arrival
    is_applied: bool = False  # whether the engine has applied this assignment, or its removal, in its present run
    # Whether the assignment has other devices or stages than the one before, so that reports that the engine makes
    # before it applies this one belong to the old one
    is_anew: bool = False
    # The engine's progress with the assignment
    assignment_state: AssignmentState.ValueType = AssignmentState.ASSIGNMENT_STATE_LOADING
    failure: Failure | None = None  # why the engine refused the assignment. None: it did not.

    @property
    def held_generation(self) -> int:
        """The generation as reported to the planner: 0 when nothing is held."""
        return self.generation if self.assignment is not None else 0

    @property
    def open_change(self) -> ChangeState | None:
        """The one change in progress: neither ended nor, after a flip, resolved here."""
        return next((change for change in self.changes.values() if not change.has_ended), None)

    def remember(self, nonce: str, answer: ConnectNodeRequest) -> None:
        """Remember the answer to a delta, which may be repeated."""
        self.nonce, self.answer = nonce, answer

    def take_assignment(self, delta: Delta, state: AssignmentState.ValueType, *, epoch: int) -> bool:
        """Take an assignment, or a removal, which starts in ``state``. Return whether it is new."""
        self.epoch = epoch
        if delta.generation == self.generation:
            return False
        self.generation = delta.generation
        before, new = self.assignment or Assignment(), delta.assignment
        self.is_anew = (list(before.stages), list(before.devices)) != (list(new.stages), list(new.devices))
        self.assignment = deepcopy(new) if delta.HasField("assignment") else None
        self.must_apply(state)
        return True

    def forget_assignment(self) -> None:
        """Drop the assignment, its generation and the last answer, so that a planner starts anew."""
        self.assignment, self.generation, self.is_applied = None, 0, True
        self.nonce, self.answer = "", None

    def must_apply(self, state: AssignmentState.ValueType) -> None:
        """Mark the assignment to be applied by the engine; until then it is in ``state``."""
        self.is_applied, self.failure, self.assignment_state = False, None, state

    def applied(self, answer: AssignmentState.ValueType | Failure) -> None:
        """Record the engine's answer to the assignment: its state, or why it was refused."""
        self.is_applied = True
        if isinstance(answer, Failure):
            self.failure, self.assignment_state = answer, AssignmentState.ASSIGNMENT_STATE_FAILED
        else:
            self.assignment_state, self.is_anew = answer, False

    def enter(self, change: ChangeState, phase: ChangePhase.ValueType, *, now_s: float) -> None:
        """Let a change enter its next phase, and forget the oldest of too many that have ended."""
        if phase in FLIPPED and self.assignment is not None:
            self.generation = max(self.generation, change.change.generation)
        change.reach(phase, generation=self.held_generation, now_s=now_s)
        ended = [known.id for known in self.changes.values() if known.has_ended]
        for change_id in ended[: max(len(ended) - MOST_ENDED, 0)]:
            del self.changes[change_id]

    def to_bytes(self, *, clock: str) -> bytes:
        """Return the bytes kept on disk. ``clock`` identifies the clock of deadlines, which a reboot changes."""
        data = {name: getattr(self, name) for name in _SAVED}
        changes = [
            {key: getattr(change, name) for key, name in _SAVED_OF_CHANGE.items()} for change in self.changes.values()
        ]
        return json.dumps({**data, "clock": clock, "changes": changes}, sort_keys=True, default=_text).encode()

    @classmethod
    def from_bytes(cls, body: bytes, *, clock: str) -> ReplicaState:
        """Read what `to_bytes` wrote. Deadlines on another clock count as passed. Raises DamagedStateError."""
        try:
            data = json.loads(body)
            same_clock = data["clock"] == clock
            changes = [_change_of(entry, same_clock=same_clock) for entry in data["changes"]]
            return cls(
                replica=data["replica"],
                generation=int(data["generation"]),
                epoch=int(data["epoch"]),
                assignment=_message(Assignment, data["assignment"]),
                is_anew=bool(data.get("is_anew", False)),
                nonce=data["nonce"],
                answer=_message(ConnectNodeRequest, data["answer"]),
                changes={change.id: change for change in changes},
            )
        except (ValueError, KeyError, TypeError, DecodeError) as error:
            raise DamagedStateError(f"{type(error).__name__}: {error}") from None


def epoch_to_bytes(epoch: int) -> bytes:
    return json.dumps({"newest_epoch": epoch}).encode()


def epoch_from_bytes(body: bytes) -> int:
    """Return the newest epoch that was obeyed. Raises DamagedStateError if the bytes cannot be read."""
    try:
        return int(json.loads(body)["newest_epoch"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStateError(f"{type(error).__name__}: {error}") from None


# Fields as they are saved, and those of a change by their keys.
_SAVED = ("replica", "generation", "epoch", "assignment", "is_anew", "nonce", "answer")
_SAVED_OF_CHANGE = {
    **{name: name for name in ("change", "parts", "epoch", "deadline_s", "status", "why", "is_resolved", "ended_s")},
    "wanted": "desired",
}


def _change_of(data: dict[str, Any], *, same_clock: bool) -> ChangeState:
    return ChangeState(
        change=Change.FromString(_bytes(data["change"])),
        parts=tuple(data["parts"]),
        epoch=int(data["epoch"]),
        deadline_s=float(data["deadline_s"]) if same_clock else float("-inf"),
        status=ChangeStatus.FromString(_bytes(data["status"])),
        desired=DesiredPhase(data["wanted"]),
        why=_message(Failure, data["why"]),
        is_resolved=bool(data["is_resolved"]),
        ended_s=None if data["ended_s"] is None or not same_clock else float(data["ended_s"]),
    )


def _text(message: Message) -> str:
    """Return a message as it is saved in JSON."""
    return base64.b64encode(message.SerializeToString()).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _message(kind: type[MessageT], text: str | None) -> MessageT | None:
    return None if text is None else kind.FromString(_bytes(text))


class Fence:
    """The newest epoch that this node has obeyed. It only grows, and is on disk before anything is done under it."""

    def __init__(self, newest: int, outbox: Outbox) -> None:
        self.newest = newest
        self._outbox = outbox

    def is_stale(self, epoch: int) -> bool:
        """Return whether a planner of this epoch may no longer change anything. 0 is not an epoch."""
        return epoch < max(self.newest, 1)

    def raise_to(self, epoch: int) -> None:
        if epoch > self.newest:
            self.newest = epoch
            self._outbox.persist(NODE_PART, epoch_to_bytes(epoch))


def wrong_fields(delta: Delta) -> Failure | None:
    """Return INVALID_FIELD with every field that is wrong, or None if the delta is well-formed."""
    problems = list(_problems(delta))
    if not problems:
        return None
    text = "; ".join(f"{name}: {what}" for name, what in problems)
    failure = failure_of(ErrorReason.ERROR_REASON_INVALID_FIELD, text)
    failure.field_violations.extend(FieldViolation(field=name, description=what) for name, what in problems)
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
        case ("commit" | "abort" | "resolved") as kind:
            if not getattr(delta, kind).change_id:
                yield f"{kind}.change_id", "is missing"
            known = (ChangeOutcome.CHANGE_OUTCOME_FLIPPED, ChangeOutcome.CHANGE_OUTCOME_ABORTED)
            if kind == "resolved" and delta.resolved.outcome not in known:
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
    timeout_s = change.prepare_timeout.ToNanoseconds() / 1e9
    if not 0 < timeout_s <= LONGEST_PREPARE_S:
        yield "prepare.change.prepare_timeout", f"is {timeout_s} s, must be above 0 and at most {LONGEST_PREPARE_S} s"


def refusal_of(delta: Delta, held: ReplicaState, can: Collection[AgentCapability.ValueType]) -> Failure | None:
    """Return why the delta cannot be accepted, or None if it can."""
    kind = delta.WhichOneof("change")
    if delta.generation > (held.generation + MOST_AHEAD if held.generation else MOST_AT_FIRST):
        failure = generation_mismatch(delta.base_generation, held.held_generation)
        far = f"generation {delta.generation} is too far above {held.generation}, the newest here"
        failure.message = f"{far}, to be plausible"
        return failure
    if kind in ("assignment", "removal"):
        return _assignment_refusal(delta, held)
    if AgentCapability.AGENT_CAPABILITY_MOVE not in can:
        return failure_of(ErrorReason.ERROR_REASON_ENGINE_CANNOT, "the engine of this node cannot move head groups")
    if kind == "prepare":
        return _prepare_refusal(delta, held)
    if kind == "commit":
        return _commit_refusal(delta, held)
    if kind == "resolved":
        change = held.changes.get(delta.resolved.change_id)
        flipped = delta.resolved.outcome == ChangeOutcome.CHANGE_OUTCOME_FLIPPED
        if change is not None and change.is_authority and flipped != (change.phase in FLIPPED):
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
        why = f"change {other.id} of the replica is under way"
        return failure_of(ErrorReason.ERROR_REASON_CHANGE_IN_FLIGHT, why, change_id=other.id)
    if held.assignment is None or delta.base_generation != held.generation:
        return generation_mismatch(delta.base_generation, held.held_generation)
    return None


def _commit_refusal(delta: Delta, held: ReplicaState) -> Failure | None:
    change_id = delta.commit.change_id
    change = held.changes.get(change_id)
    if change is None:
        why = f"change {change_id} was never prepared on this node"
        return failure_of(ErrorReason.ERROR_REASON_CHANGE_UNKNOWN, why, change_id=change_id)
    if not change.is_authority:
        return _wrong_phase(change, "is not the authority")
    return _wrong_phase(change, "is not ready") if change.phase == ChangePhase.CHANGE_PHASE_PREPARING else None


def _wrong_phase(change: ChangeState, why: str) -> Failure:
    phase = phase_name(change.phase)
    text = f"change {change.id} is {phase} here and {why}"
    return failure_of(ErrorReason.ERROR_REASON_CHANGE_PHASE, text, change_id=change.id, phase=phase)
