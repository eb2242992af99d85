"""One replica on one node: its wanted state, the state it holds, and the one delta that leads from this to that.

There is no script of messages. The planner sets the wanted state; the next delta follows from the difference, whatever
messages were lost, repeated or answered late before.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hetis.planner.failures import ServiceError
from hetis.v1 import agent_service_pb2, failure_pb2, replica_pb2, report_pb2

Reason = failure_pb2.ErrorReason
Delta = agent_service_pb2.Delta
AssignmentState = report_pb2.AssignmentState

# An agent that refuses with one of these reasons will never accept this assignment; all other reasons may pass.
_LASTING = {
    Reason.ERROR_REASON_INVALID_FIELD,
    Reason.ERROR_REASON_DEVICE_UNAVAILABLE,
    Reason.ERROR_REASON_ENGINE_CANNOT,
    Reason.ERROR_REASON_KV_BLOCKS_EXHAUSTED,
}
_CLOSED_KEPT = 1000
MOST_GENERATION = 2**62  # out of reach for any replica; a higher number would be passed on until it overflows a field
ROOM = 2**32  # generations that a node may be ahead of the planner, whose store may have been restored from a backup


def protocol_violation(message: str) -> ServiceError:
    """Return the error for an agent that breaks the protocol."""
    return ServiceError(Reason.ERROR_REASON_PROTOCOL_VIOLATION, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedAssignment:
    """The assignment that a node should hold. Equal values of ``generation`` always mean equal assignments."""

    generation: int
    assignment: replica_pb2.Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedRemoval:
    """The order that a node should hold nothing."""

    reason: str


Step = (
    agent_service_pb2.PrepareChange
    | agent_service_pb2.CommitChange
    | agent_service_pb2.AbortChange
    | agent_service_pb2.ChangeResolved
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """The last message that a node should receive about a change; it supersedes the earlier ones."""

    change_id: str
    generation: int  # generation that the change leads to
    step: Step

    @property
    def kind(self) -> str:
        """The field of ``Delta`` in which the step is sent."""
        return _FIELDS[type(self.step)]


_FIELDS = {
    agent_service_pb2.PrepareChange: "prepare",
    agent_service_pb2.CommitChange: "commit",
    agent_service_pb2.AbortChange: "abort",
    agent_service_pb2.ChangeResolved: "resolved",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaAnswer:
    """A node's answer to a delta."""

    replica: str
    kind: str  # the field of the delta that was set
    change_id: str  # empty for an assignment or removal
    failure: failure_pb2.Failure | None  # why the delta was refused; None if it was accepted


class ReplicaSlot:
    """The state of one replica on one node.

    ``most_held`` returns the highest generation that the node can hold.
    """

    def __init__(self, replica: str, most_held: Callable[[], int]) -> None:
        self.replica = replica
        self.held = 0  # generation that the node last reported; 0: none
        # Whether the last reported generation is possible. If not, ``held`` is 0 and nothing is sent.
        self.is_believed = True
        self._most_held = most_held
        # The node's progress with its assignment, as last reported
        self.state: AssignmentState.ValueType = report_pb2.ASSIGNMENT_STATE_UNSPECIFIED
        # What the node reported as wrong, or why it refused the assignment permanently; None: nothing
        self.failure: failure_pb2.Failure | None = None
        self.report: report_pb2.ReplicaReport | None = None  # the node's last report; None before the first
        # Ended changes whose outcome the node has acknowledged on this stream. Later reports of them get no answer,
        # because the node would only acknowledge it again.
        self.closed: set[str] = set()
        # None: no state was wanted yet, so nothing is sent
        self.wanted: WantedAssignment | WantedRemoval | None = None
        self._directives: dict[str, Directive] = {}  # by change id
        self._delivered: dict[str, str] = {}  # kind of the last answered directive, by change id
        self._refused: int | None = None  # generation of the assignment that was refused permanently
        self._retry_s = 0.0  # earliest time of the next attempt; 0: none is delayed
        self._in_flight: Delta | None = None  # sent but not answered
        self._sent_s = 0.0  # when the delta in flight was last sent

    @property
    def num_directives(self) -> int:
        return len(self._directives)

    def due_s(self, answer_s: float) -> float | None:
        """Return when a delta may become due by time alone (a missing answer, or a delayed retry), or None."""
        if not self.is_believed:
            return None
        if self._in_flight is not None:
            return self._sent_s + answer_s
        return self._retry_s if self._retry_s > 0.0 else None

    @property
    def in_flight(self) -> str:
        """The nonce of the delta in flight, or an empty string."""
        return "" if self._in_flight is None else self._in_flight.nonce

    def want(self, wanted: WantedAssignment | WantedRemoval) -> None:
        if self.wanted != wanted:
            self.wanted, self._refused, self._retry_s = wanted, None, 0.0

    def set_directive(self, directive: Directive) -> None:
        """Make ``directive`` the last message that the node should receive about its change."""
        self._directives[directive.change_id] = directive

    def forget_change(self, change_id: str) -> None:
        """Forget a change about which nothing more is to be sent."""
        self._directives.pop(change_id, None)
        self._delivered.pop(change_id, None)

    def close_change(self, change_id: str) -> None:
        """Close a change whose outcome the node knows, and whose report no coordinator awaits."""
        self.forget_change(change_id)
        if len(self.closed) >= _CLOSED_KEPT:
            self.closed.clear()  # at worst, each is answered once more
        self.closed.add(change_id)

    def resend(self, change_id: str) -> None:
        """Send an answered directive again, since the node may have forgotten it."""
        self._delivered.pop(change_id, None)

    def restart(self, held: int, state: AssignmentState.ValueType) -> None:
        """Begin a new stream from the state that the agent reports. A delta in flight is void and is sent again."""
        self.state = state
        self.hold(held)
        self._in_flight = None
        self._delivered.clear()
        self.closed.clear()
        self._retry_s = 0.0

    def next_delta(self, now_s: float, *, answer_s: float) -> Delta | None:
        """Return the delta to send now, if any. A delta is repeated after ``answer_s`` without an answer."""
        if not self.is_believed:
            return None
        if self._in_flight is not None:
            if now_s - self._sent_s < answer_s:
                return None
        else:
            self._in_flight = self._difference(now_s)
            if self._in_flight is None:
                return None
            self._in_flight.nonce, self._in_flight.replica = str(uuid.uuid4()), self.replica
        self._sent_s = now_s
        return self._in_flight

    def acknowledge(self, ack: agent_service_pb2.DeltaAck) -> DeltaAnswer | None:
        """Handle an ack; return None if it does not answer the delta in flight."""
        delta = self._answered(ack.nonce)
        if delta is None:
            return None
        self.hold(ack.generation)
        if not self.is_believed:
            return self._answer(delta, self.failure)
        if delta.WhichOneof("change") == "assignment":
            self.failure = None
            if self.state == report_pb2.ASSIGNMENT_STATE_FAILED:  # the state of the previous assignment
                self.state = report_pb2.ASSIGNMENT_STATE_UNSPECIFIED
        elif delta.WhichOneof("change") == "removal":
            self.state, self.report = report_pb2.ASSIGNMENT_STATE_STOPPED, None
        return self._answer(delta, None)

    def refuse(self, nack: agent_service_pb2.DeltaNack, *, now_s: float, retry_s: float) -> DeltaAnswer | None:
        """Handle a nack; return None if it does not answer the delta in flight.

        The assignment is sent again ``retry_s`` from now if that may help.
        """
        delta = self._answered(nack.nonce)
        if delta is None:
            return None
        self.hold(nack.generation)
        if self.is_believed and delta.WhichOneof("change") in ("assignment", "removal"):
            if nack.failure.reason in _LASTING:
                self._refused, self.failure = delta.generation, nack.failure
            elif nack.failure.reason != Reason.ERROR_REASON_GENERATION_MISMATCH:
                self._retry_s = now_s + retry_s
        return self._answer(delta, nack.failure)

    def learn(self, report: report_pb2.ReplicaReport) -> bool:
        """Handle a report unless it precedes an assignment; return whether anything but numbers changed."""
        if report.generation < self.held:
            return False
        before = (self.held, self.state, self.failure, self.report is None)
        self.hold(report.generation)
        if not self.is_believed:
            return before[:3] != (self.held, self.state, self.failure)
        self.state = report.assignment_state
        if self._refused is None:
            self.failure = report.failure if report.HasField("failure") else None
        self.report = report
        return before != (self.held, self.state, self.failure, False)

    def hold(self, generation: int) -> None:
        """Record the generation that the node reports to hold.

        An impossible number is not passed on to other nodes: the replica is left alone on this node until it reports
        another one.
        """
        was_believed, self.is_believed = self.is_believed, generation <= self._most_held()
        if self.is_believed:
            self.held = generation
            if not was_believed:
                self.failure = None
            return
        self.held, self.state, self.report = 0, report_pb2.ASSIGNMENT_STATE_UNSPECIFIED, None
        message = f"the node reports generation {generation} of {self.replica}, which it was never assigned"
        self.failure = protocol_violation(message).to_proto()

    def _answered(self, nonce: str) -> Delta | None:
        delta = self._in_flight
        if delta is None or delta.nonce != nonce:
            return None
        self._in_flight = None
        return delta

    def _answer(self, delta: Delta, failure: failure_pb2.Failure | None) -> DeltaAnswer:
        kind = delta.WhichOneof("change")
        assert kind is not None
        part: Any = getattr(delta, kind)
        change_id: str = getattr(part.change if kind == "prepare" else part, "change_id", "")
        if change_id in self._directives:
            self._delivered[change_id] = kind
        return DeltaAnswer(replica=self.replica, kind=kind, change_id=change_id, failure=failure)

    def _difference(self, now_s: float) -> Delta | None:
        # Outcomes come first: an assignment would end the changes, too, but with an outcome of the agent's choice.
        due = [one for one in self._directives.values() if self._delivered.get(one.change_id) != one.kind]
        for directive in due:
            if directive.kind != "prepare":
                return self._delta_of(directive)
        if now_s >= self._retry_s:
            self._retry_s = 0.0
            if (delta := self._assignment()) is not None:
                return delta
        return self._delta_of(due[0]) if due else None

    def _assignment(self) -> Delta | None:
        wanted = self.wanted
        if isinstance(wanted, WantedRemoval):
            if self.held == 0:
                return None
            removal = agent_service_pb2.AssignmentRemoval(reason=wanted.reason)
            return Delta(base_generation=self.held, generation=self.held + 1, removal=removal)
        if wanted is None or self.held >= wanted.generation or wanted.generation == self._refused:
            return None
        return Delta(base_generation=0, generation=wanted.generation, assignment=wanted.assignment)

    def _delta_of(self, directive: Directive) -> Delta:
        # Only a prepare builds on what the node holds; other directives are matched by change id. After the flip, or a
        # newer assignment, the node is at or above their generation, and a delta must build on one below its own.
        base = self.held if directive.kind == "prepare" else min(self.held, directive.generation - 1)
        delta = Delta(generation=directive.generation, base_generation=base)
        getattr(delta, directive.kind).CopyFrom(directive.step)
        return delta
