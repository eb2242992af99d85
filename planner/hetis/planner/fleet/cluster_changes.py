"""The re-dispatches of one cluster: running ones, advised ones, and ended ones that nodes still mention."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

from hetis.planner.failures import Reason, ServiceError, not_found
from hetis.planner.fleet.activation import NodeState
from hetis.planner.fleet.changes import FINAL, MOST_OF_NODE, ChangeCoordinator, LateChanges, Outcome, State, parts_of
from hetis.planner.fleet.deltas import DeltaAnswer
from hetis.planner.fleet.leases import Leases
from hetis.planner.fleet.link import NodeLink
from hetis.planner.fleet.replica import Replica
from hetis.planner.fleet.settings import FleetCounters, FleetSettings
from hetis.v1 import change_pb2, failure_pb2, redispatch_pb2, report_pb2

_ENDED_KEPT = 1000
_log = logging.getLogger("hetis.planner.fleet")


class Around(Protocol):
    """The parts of `hetis.planner.fleet.cluster.ClusterFleet` that are used here."""

    replicas: dict[str, Replica]
    leases: Leases
    dirty: set[str]
    shown: set[tuple[str, str]]
    counters: FleetCounters
    settings: FleetSettings

    def link(self, node: str) -> NodeLink: ...

    def talk(self, node: str) -> None:
        """Note that there is something to send to the node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The outcome of a change, for nodes that reconnect and ask."""

    outcome: Outcome.ValueType
    moves: tuple[change_pb2.MoveResult, ...]


class ClusterChanges:
    """The re-dispatches of a cluster."""

    def __init__(self, cluster: Around) -> None:
        self.under_way: dict[str, ChangeCoordinator] = {}  # by change id
        self.advised: list[redispatch_pb2.Redispatch] = []  # re-dispatches that are only stored
        self.late = LateChanges()  # changes that nodes mention and that are not under way
        self.ended: list[redispatch_pb2.Redispatch] = []  # re-dispatches that ended since they were last taken
        self._cluster = cluster
        self._endings: OrderedDict[str, Ended] = OrderedDict()

    @property
    def have_news(self) -> bool:
        """Return whether there is something that the store should know."""
        return bool(self.advised) or any(one.is_unsaved or one.has_ended for one in self.under_way.values())

    def of(self, replica: Replica) -> ChangeCoordinator | None:
        return self.under_way.get(replica.change_id)

    def propose(self, body: redispatch_pb2.Redispatch, *, now_s: float) -> None:
        """Begin a re-dispatch, which is in effect once it is stored. ADVISED ones are only stored.

        Raises NOT_FOUND, CHANGE_IN_FLIGHT, GENERATION_MISMATCH, DEVICE_UNAVAILABLE or INVALID_FIELD.
        """
        replica = self._cluster.replicas.get(body.replica)
        if replica is None:
            raise not_found(body.replica)
        if body.state == State.REDISPATCH_STATE_ADVISED:
            self.advised.append(body)
            return
        if replica.change_id:
            message = f"change {replica.change_id} of {replica.name} is under way"
            raise ServiceError(Reason.ERROR_REASON_CHANGE_IN_FLIGHT, message, metadata={"change_id": replica.change_id})
        primary = self._cluster.link(replica.primary_node).slot(replica.name)
        if body.change.base_generation != primary.held or not primary.held:
            raise ServiceError(
                Reason.ERROR_REASON_GENERATION_MISMATCH,
                f"the change builds on generation {body.change.base_generation} of {replica.name}, which is at"
                f" {primary.held}",
                metadata={"base_generation": body.change.base_generation, "generation": primary.held},
            )
        parts = parts_of(
            body.change,
            replica.record.body.shape,
            primary_node=replica.primary_node,
            moves_heads=lambda node: self._cluster.link(node).moves_heads,
        )
        lost = sorted(node for node in parts if self._cluster.leases.state(node) != NodeState.NODE_STATE_READY)
        if lost:
            message = f"node {lost[0]} is not ready"
            raise ServiceError(Reason.ERROR_REASON_DEVICE_UNAVAILABLE, message, metadata={"device": lost[0]})
        body.change.generation = max(replica.generation, primary.held) + 1
        change = ChangeCoordinator(body, parts, now_s=now_s, again_s=self._cluster.settings.answer_s)
        if primary.report is not None:
            change.see_report(replica.primary_node, primary.report)
        self.under_way[change.change_id] = change
        replica.change_id = change.change_id
        self._cluster.dirty.add(replica.name)

    def resume(self, kept: redispatch_pb2.Redispatch, *, now_s: float) -> None:
        """Resume a re-dispatch that an earlier planner left."""
        body = deepcopy(kept)
        change = ChangeCoordinator.resumed(body, now_s=now_s, again_s=self._cluster.settings.answer_s)
        self.under_way[change.change_id] = change
        replica = self._cluster.replicas.get(body.replica)
        if replica is None:
            change.give_up(_gone(body.replica))
        else:
            replica.change_id = change.change_id
        self.tell(change)

    def tell(self, change: ChangeCoordinator) -> None:
        """Pass the current directives of a change to the links of its nodes."""
        directives = change.directives()
        for node in change.nodes:
            link = self._cluster.link(node)
            if node in directives:
                link.slot(change.body.replica).tell(directives[node])
                self._cluster.talk(node)
            elif change.body.replica in link.slots:
                link.slot(change.body.replica).forget_change(change.change_id)
        self._cluster.shown.add(("redispatch", change.body.name))

    def end(self, change: ChangeCoordinator) -> None:
        """Remove a change whose outcome is stored."""
        cluster = self._cluster
        del self.under_way[change.change_id]
        self.tell(change)
        cluster.counters.contradictions += change.num_contradictions
        if change.num_contradictions:
            _log.warning("nodes contradict each other, or themselves", extra={"redispatch": change.body.name})
        cluster.counters.redispatches[State.Name(change.state)] += 1
        self._remember_end(change.body)
        self.ended.append(change.body)
        replica = cluster.replicas.get(change.body.replica)
        if replica is not None and replica.change_id == change.change_id:
            replica.change_id = ""
            cluster.shown.add(("replica", replica.name))

    def give_up(self, replica: Replica) -> None:
        """Give up the change of a replica whose record is gone."""
        if (change := self.of(replica)) is not None:
            change.give_up(_gone(replica.name))

    # Input from nodes.

    def reconnected(self, node: str, said: Iterable[change_pb2.ChangeStatus]) -> None:
        """Note that a new stream of the node began, in which it listed these changes."""
        listed = {status.change_id: status for status in said}
        for change in list(self.under_way.values()):
            if node in change.nodes:
                change.reconnected(node, lists_change=change.change_id in listed)
        for status in listed.values():
            self.hear(node, status)

    def hear(self, node: str, status: change_pb2.ChangeStatus) -> None:
        """Take a node's report of a change's phase."""
        change = self.under_way.get(status.change_id)
        if change is not None:
            change.hear(node, status)
            self.tell(change)
        elif status.phase != change_pb2.CHANGE_PHASE_RELEASED and not self._is_closed(node, status):
            if status.change_id in self._endings:
                self._answer_late(node, status)
            else:
                self.late.add(node, status)

    def see_report(self, node: str, replica: Replica, report: report_pb2.ReplicaReport) -> None:
        if (change := self.of(replica)) is not None:
            was = change.state
            change.see_report(node, report)
            if change.state != was:
                self.tell(change)

    def answered(self, node: str, answer: DeltaAnswer, *, now_s: float) -> None:
        """Take a node's answer to a directive."""
        change = self.under_way.get(answer.change_id)
        if change is not None:
            change.answered(node, answer.kind, answer.failure, now_s=now_s)
            self.tell(change)
        elif answer.kind == "resolved" or answer.failure is not None:
            slot = self._cluster.link(node).slots.get(answer.replica)
            if slot is not None:
                slot.close_change(answer.change_id)

    def note_presence(self, node: str, state: NodeState.ValueType) -> None:
        for change in list(self.under_way.values()):
            if node in change.nodes:
                if state == NodeState.NODE_STATE_LOST:
                    change.lose(node)
                else:
                    change.regain(node)
                self.tell(change)

    def pass_time(self, now_s: float) -> None:
        """Expire deadlines, and schedule what should be sent again."""
        for change in list(self.under_way.values()):
            was = change.state
            for node in change.pass_time(now_s):
                self._cluster.link(node).slot(change.body.replica).tell_again(change.change_id)
                self._cluster.talk(node)
            if change.state != was:
                self.tell(change)

    # Changes that are over.

    def found_late(self, change_id: str, body: redispatch_pb2.Redispatch | None) -> None:
        """Answer nodes that mention an ended change; ``body`` is as stored, None if the store knows no such change."""
        if body is not None and body.state in FINAL:
            self._remember_end(body)
        for node, status in self.late.take(change_id):
            self._answer_late(node, status)

    def _is_closed(self, node: str, status: change_pb2.ChangeStatus) -> bool:
        slot = self._cluster.link(node).slots.get(status.replica)
        return slot is not None and status.change_id in slot.closed

    def _answer_late(self, node: str, status: change_pb2.ChangeStatus) -> None:
        ended = self._endings.get(status.change_id)
        directive = self.late.directive(
            status, outcome=None if ended is None else ended.outcome, moves=() if ended is None else ended.moves
        )
        slot = self._cluster.link(node).heard_slot(status.replica)
        if slot is not None and slot.num_directives < MOST_OF_NODE:  # nodes mention the others again
            slot.tell(directive)
            self._cluster.talk(node)

    def _remember_end(self, body: redispatch_pb2.Redispatch) -> None:
        authority = [one for one in body.nodes if change_pb2.CHANGE_PART_AUTHORITY in one.parts]
        is_done = body.state == State.REDISPATCH_STATE_DONE
        self._endings[body.change.change_id] = Ended(
            outcome=Outcome.CHANGE_OUTCOME_FLIPPED if is_done else Outcome.CHANGE_OUTCOME_ABORTED,
            moves=tuple(authority[0].status.moves) if authority else (),
        )
        if len(self._endings) > _ENDED_KEPT:
            self._endings.popitem(last=False)


def _gone(replica: str) -> failure_pb2.Failure:
    return ServiceError(
        Reason.ERROR_REASON_CHANGE_CANCELLED, f"{replica} was removed before it was known how the change ended"
    ).to_proto()
