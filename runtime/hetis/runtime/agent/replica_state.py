"""The state that an agent keeps, in memory and on disk: assignment, changes and last answer of a replica; the fence."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from google.protobuf.message import DecodeError

from hetis.runtime.agent.outbox import Outbox
from hetis.v1.agent_service_pb2 import ConnectNodeRequest
from hetis.v1.change_pb2 import Change, ChangePart, ChangePhase, ChangeStatus
from hetis.v1.failure_pb2 import Failure
from hetis.v1.replica_pb2 import Assignment
from hetis.v1.report_pb2 import AssignmentState

NODE_PART = "node"  # part on disk for what concerns no single replica; names of replicas contain slashes


class DamagedStateError(ValueError):
    """A part of the saved state cannot be read."""


class DesiredPhase(StrEnum):
    """The phase that a change was last asked to reach; preparing begins without being asked."""

    PREPARED = "prepared"
    FLIPPED = "flipped"
    ABORTED = "aborted"
    RELEASED = "released"


_RANK = {
    ChangePhase.CHANGE_PHASE_UNSPECIFIED: 0,
    ChangePhase.CHANGE_PHASE_PREPARING: 1,
    ChangePhase.CHANGE_PHASE_READY: 2,
    ChangePhase.CHANGE_PHASE_FLIPPED: 3,
    ChangePhase.CHANGE_PHASE_ABORTED: 4,
    ChangePhase.CHANGE_PHASE_RELEASED: 4,
}


@dataclass(slots=True, kw_only=True)
class ChangeState:
    """A change on this node.

    Attributes:
        change: as prepared. Only its id and replica are set if an abort or the engine was the first to mention it.
        parts: this node's parts in it.
        epoch: of the planner that gave the last directive.
        deadline_s: until when it may be prepared, on the clock that is passed in.
        status: its progress as reported to the planner.
        desired: the phase that is to be reached.
        why: reason for the desired abort.
        is_resolved: a ``resolved`` delta has arrived.
        ended_s: when it reached its last phase. None: it has not.
        is_reserved: the engine has answered ReserveMoves in this run of the agent.
        is_abort_tried: the engine was asked to abort since the abort became desired. An assignment waits for one try.
    """

    change: Change
    parts: tuple[ChangePart.ValueType, ...]
    epoch: int
    deadline_s: float
    status: ChangeStatus
    desired: DesiredPhase = DesiredPhase.PREPARED
    why: Failure | None = None
    is_resolved: bool = False
    ended_s: float | None = None
    is_reserved: bool = False
    is_abort_tried: bool = False

    @property
    def id(self) -> str:
        return self.change.change_id

    @property
    def phase(self) -> ChangePhase.ValueType:
        return self.status.phase

    @property
    def is_open(self) -> bool:
        """The change can still flip and still abort."""
        return self.phase in (ChangePhase.CHANGE_PHASE_PREPARING, ChangePhase.CHANGE_PHASE_READY)

    @property
    def is_being_prepared(self) -> bool:
        """The change is open and may stay so until its deadline."""
        return self.is_open and self.desired is DesiredPhase.PREPARED

    @property
    def has_ended(self) -> bool:
        """The change is in its last phase."""
        return self.phase in (ChangePhase.CHANGE_PHASE_ABORTED, ChangePhase.CHANGE_PHASE_RELEASED)

    @property
    def is_authority(self) -> bool:
        return ChangePart.CHANGE_PART_AUTHORITY in self.parts

    @property
    def copies(self) -> bool:
        """This node sends or receives KV in the change."""
        return any(part != ChangePart.CHANGE_PART_AUTHORITY for part in self.parts)

    def may_become(self, phase: ChangePhase.ValueType) -> bool:
        """Return whether the change may enter a phase: they only go forward, and FLIPPED never becomes ABORTED."""
        if self.phase == ChangePhase.CHANGE_PHASE_FLIPPED:
            return phase == ChangePhase.CHANGE_PHASE_RELEASED
        return _RANK[phase] > _RANK[self.phase]


@dataclass(slots=True, kw_only=True)
class ReplicaState:
    """The state of one replica as the agent holds it.

    Attributes:
        replica: its name.
        generation: of its state on this node; kept after a removal, so that nothing older is accepted.
        epoch: of the planner that sent the assignment.
        assignment: None: it was removed, or never assigned.
        nonce: of the last delta.
        answer: to that delta.
        changes: by id, in order of arrival.
        is_applied: the engine has applied this assignment, or its removal, in its present run.
        is_anew: the assignment has other devices or stages than the one before, so reports that the engine makes before
            it applies this one belong to the old one.
        assignment_state: the engine's progress with it.
        failure: why the engine refused the assignment. None: it did not.
    """

    replica: str
    generation: int = 0
    epoch: int = 0
    assignment: Assignment | None = None
    nonce: str = ""
    answer: ConnectNodeRequest | None = None
    changes: dict[str, ChangeState] = field(default_factory=dict)
    is_applied: bool = False
    is_anew: bool = False
    assignment_state: AssignmentState.ValueType = AssignmentState.ASSIGNMENT_STATE_LOADING
    failure: Failure | None = None

    @property
    def held_generation(self) -> int:
        """The generation as the planner is told: 0 when nothing is held."""
        return self.generation if self.assignment is not None else 0

    @property
    def open_change(self) -> ChangeState | None:
        """The one change that is under way: neither ended nor, after a flip, resolved here."""
        return next((change for change in self.changes.values() if not change.has_ended), None)

    def to_bytes(self, *, clock: str) -> bytes:
        """Return the bytes kept on disk. ``clock`` names what deadlines count on, which a reboot changes."""
        data = {
            "replica": self.replica,
            "generation": self.generation,
            "epoch": self.epoch,
            "assignment": None if self.assignment is None else _text(self.assignment.SerializeToString()),
            "is_anew": self.is_anew,
            "nonce": self.nonce,
            "answer": None if self.answer is None else _text(self.answer.SerializeToString()),
            "clock": clock,
            "changes": [_change_data(change) for change in self.changes.values()],
        }
        return json.dumps(data, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, body: bytes, *, clock: str) -> ReplicaState:
        """Read what `to_bytes` wrote. Deadlines on another clock count as passed.

        Raises:
            DamagedStateError: the bytes cannot be read.
        """
        try:
            data = json.loads(body)
            same_clock = data["clock"] == clock
            changes = [_change_of(entry, same_clock=same_clock) for entry in data["changes"]]
            return cls(
                replica=data["replica"],
                generation=int(data["generation"]),
                epoch=int(data["epoch"]),
                assignment=None if data["assignment"] is None else Assignment.FromString(_bytes(data["assignment"])),
                is_anew=bool(data.get("is_anew", False)),
                nonce=data["nonce"],
                answer=None if data["answer"] is None else ConnectNodeRequest.FromString(_bytes(data["answer"])),
                changes={change.id: change for change in changes},
            )
        except (ValueError, KeyError, TypeError, DecodeError) as error:
            raise DamagedStateError(f"{type(error).__name__}: {error}") from None


def epoch_to_bytes(epoch: int) -> bytes:
    return json.dumps({"newest_epoch": epoch}).encode()


def epoch_from_bytes(body: bytes) -> int:
    """Return the newest epoch that was obeyed.

    Raises:
        DamagedStateError: the bytes cannot be read.
    """
    try:
        return int(json.loads(body)["newest_epoch"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStateError(f"{type(error).__name__}: {error}") from None


def _change_data(change: ChangeState) -> dict[str, Any]:
    return {
        "change": _text(change.change.SerializeToString()),
        "parts": [int(part) for part in change.parts],
        "epoch": change.epoch,
        "deadline_s": change.deadline_s,
        "status": _text(change.status.SerializeToString()),
        "wanted": change.desired.value,
        "why": None if change.why is None else _text(change.why.SerializeToString()),
        "is_resolved": change.is_resolved,
        "ended_s": change.ended_s,
    }


def _change_of(data: dict[str, Any], *, same_clock: bool) -> ChangeState:
    return ChangeState(
        change=Change.FromString(_bytes(data["change"])),
        parts=tuple(data["parts"]),
        epoch=int(data["epoch"]),
        deadline_s=float(data["deadline_s"]) if same_clock else float("-inf"),
        status=ChangeStatus.FromString(_bytes(data["status"])),
        desired=DesiredPhase(data["wanted"]),
        why=None if data["why"] is None else Failure.FromString(_bytes(data["why"])),
        is_resolved=bool(data["is_resolved"]),
        ended_s=None if data["ended_s"] is None or not same_clock else float(data["ended_s"]),
    )


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


class Fence:
    """The newest epoch that this node has obeyed. It only grows, and reaches the disk before anything of it is done."""

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
