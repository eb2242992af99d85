"""The re-dispatches of one running cluster: which are under way, on which replicas, and the directives for their nodes.

A `ChangeCoordinator` decides about one change and knows neither links nor other changes. Like it, this module has no
I/O: reports of nodes and stored changes go in, directives and snapshots to be stored come out.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable
from copy import deepcopy
from typing import Protocol

from hetis.planner.convert.names import last_part
from hetis.planner.failures import Reason, ServiceError, not_found
from hetis.planner.fleet.activation import NodeState
from hetis.planner.fleet.agents.deltas import DeltaAnswer, Directive, ReplicaSlot, Step
from hetis.planner.fleet.agents.leases import Leases
from hetis.planner.fleet.agents.link import NodeLink
from hetis.planner.fleet.changes import ChangeCoordinator, Outcome, Phase, Saving, State, parts_of
from hetis.planner.fleet.replica import Replica
from hetis.planner.fleet.settings import FleetCounters, FleetSettings
from hetis.planner.store.records import FINAL_REDISPATCHES
from hetis.v1 import agent_service_pb2, change_pb2, failure_pb2, redispatch_pb2, report_pb2

_log = logging.getLogger("hetis.planner.fleet")
_MOST_LATE = 10_000
_ENDED_KEPT = 1000
MOST_OF_NODE = 100  # a node has one change under way per replica, and few replicas


class RunningCluster(Protocol):
    """What re-dispatches see of their cluster, and what they change there. `ClusterFleet` is the one that runs."""

    replicas: dict[str, Replica]  # by name
    links: dict[str, NodeLink]  # by node id; a node that is not needed any more has none
    leases: Leases
    settings: FleetSettings
    counters: FleetCounters

    def slot(self, node: str, replica: str) -> ReplicaSlot | None:
        """Return the state of a replica on a node, or None if the node neither has nor is to get it."""

    def ensure_link(self, node: str) -> NodeLink:
        """Return the node's link, a new one if it has none."""

    def mark_sendable(self, node: str) -> None:
        """Record that there are messages for the node."""

    def mark_dirty(self, replica: str) -> None:
        """Mark the replica for the next decision."""

    def show(self, kind: str, name: str) -> None:
        """Record that the view of a replica or re-dispatch changed."""

    def forget_if_unneeded(self, node: str) -> None:
        """Forget a node on which no change depends any more, unless it is needed otherwise."""


class ClusterChanges:
    """The re-dispatches of one cluster."""

    def __init__(self, cluster: RunningCluster) -> None:
        self.under_way: dict[str, ChangeCoordinator] = {}  # coordinators by change id
        self._of_replica: dict[str, ChangeCoordinator] = {}  # coordinators by replica
        self._advised: list[redispatch_pb2.Redispatch] = []  # re-dispatches that are only stored
        self.late = LateChanges()  # changes that have ended
        self._ended: list[redispatch_pb2.Redispatch] = []  # re-dispatches that ended since they were last taken
        self._cluster = cluster

    @property
    def has_unsaved(self) -> bool:
        """Whether there are changes to store."""
        return bool(self._advised) or any(one.is_unsaved or one.has_ended for one in self.under_way.values())

    def of(self, replica: Replica) -> ChangeCoordinator | None:
        return self._of_replica.get(replica.name)

    def propose(self, body: redispatch_pb2.Redispatch, *, now_s: float) -> None:
        """Begin a re-dispatch, which takes effect once it is stored. One that is ADVISED is only stored.

        Raises NOT_FOUND, CHANGE_IN_FLIGHT, GENERATION_MISMATCH, DEVICE_UNAVAILABLE or INVALID_FIELD.
        """
        replica = self._cluster.replicas.get(body.replica)
        if replica is None:
            raise not_found(body.replica)
        if body.state == State.REDISPATCH_STATE_ADVISED:
            self._advised.append(body)
            return
        if (running := self.of(replica)) is not None:
            message = f"change {running.change_id} of {replica.name} is in progress"
            raise ServiceError(Reason.ERROR_REASON_CHANGE_IN_FLIGHT, message, metadata={"change_id": running.change_id})
        primary = self._cluster.slot(replica.primary_node, replica.name)
        base, held = body.change.base_generation, 0 if primary is None else primary.held
        if primary is None or base != held or not held:
            raise ServiceError(
                Reason.ERROR_REASON_GENERATION_MISMATCH,
                f"the change is based on generation {base} of {replica.name}, which is at {held}",
                metadata={"base_generation": base, "generation": held},
            )
        parts = parts_of(
            body.change,
            replica.record.body.shape,
            primary_node=replica.primary_node,
            moves_heads=self._moves_heads,
        )
        lost = sorted(node for node in parts if self._cluster.leases.state(node) != NodeState.NODE_STATE_READY)
        if lost:
            message = f"node {lost[0]} is not ready"
            raise ServiceError(Reason.ERROR_REASON_DEVICE_UNAVAILABLE, message, metadata={"device": lost[0]})
        body.change.generation = max(replica.generation, held) + 1
        change = ChangeCoordinator(body, parts, now_s=now_s, again_s=self._cluster.settings.answer_s)
        if primary.report is not None:
            change.see_report(replica.primary_node, primary.report)
        self.under_way[change.change_id] = self._of_replica[replica.name] = change
        self._cluster.mark_dirty(replica.name)

    def _moves_heads(self, node: str) -> bool:
        link = self._cluster.links.get(node)
        return link is None or link.moves_heads

    def resume(self, kept: redispatch_pb2.Redispatch, *, now_s: float) -> None:
        """Resume a re-dispatch that an earlier planner left."""
        body = deepcopy(kept)
        change = ChangeCoordinator.resumed(body, now_s=now_s, again_s=self._cluster.settings.answer_s)
        self.under_way[change.change_id] = change
        if body.replica in self._cluster.replicas:
            self._of_replica[body.replica] = change
        else:
            change.give_up(_gone(body.replica))
        self.pass_directives(change)

    def pass_directives(self, change: ChangeCoordinator) -> None:
        """Pass the current directives of a change to the links of its nodes."""
        directives = change.directives()
        for node in change.nodes:
            if node in directives:
                self._cluster.ensure_link(node).slot(change.body.replica).set_directive(directives[node])
                self._cluster.mark_sendable(node)
            elif (slot := self._cluster.slot(node, change.body.replica)) is not None:
                slot.forget_change(change.change_id)
        self._cluster.show("redispatch", change.body.name)

    # What is stored.

    def to_save(self) -> list[Saving]:
        """Return snapshots of the changes to store; the caller passes them to `saved` or `take_back`."""
        advised, self._advised = self._advised, []
        return [
            *(change.to_save() for change in self.under_way.values() if change.is_unsaved),
            *(Saving(revision=0, body=body, outcome=Outcome.CHANGE_OUTCOME_UNSPECIFIED) for body in advised),
        ]

    def take_back(self, savings: Iterable[Saving]) -> None:
        """Put back what could not be stored."""
        bodies = [saving.body for saving in savings]
        self._advised += [one for one in bodies if last_part(one.name) not in self.under_way]

    def saved(self, saving: Saving) -> None:
        """Continue a change that is now stored."""
        change = self.under_way.get(last_part(saving.body.name))
        self._cluster.show("redispatch", saving.body.name)
        if change is None:
            self._ended.append(saving.body)  # only ADVISED ones are not under way
            return
        change.saved(saving)
        if change.has_ended:
            self._end(change)
        else:
            self.pass_directives(change)

    def take_ended(self) -> list[redispatch_pb2.Redispatch]:
        """Return the re-dispatches that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _end(self, change: ChangeCoordinator) -> None:
        """Remove a change whose outcome is stored."""
        cluster = self._cluster
        del self.under_way[change.change_id]
        self.pass_directives(change)
        cluster.counters.contradictions += change.num_contradictions
        if change.num_contradictions:
            _log.warning("nodes contradict each other or themselves", extra={"redispatch": change.body.name})
        cluster.counters.redispatches[State.Name(change.state)] += 1
        self.late.remember(change.body)
        self._ended.append(change.body)
        if self._of_replica.get(change.body.replica) is change:
            del self._of_replica[change.body.replica]
            cluster.show("replica", change.body.replica)
        for node in change.nodes:
            cluster.forget_if_unneeded(node)

    def give_up(self, replica: Replica) -> None:
        """Give up the change of a replica whose record was deleted."""
        if (change := self._of_replica.pop(replica.name, None)) is not None:
            change.give_up(_gone(replica.name))

    # --- Input from nodes

    def reconnected(self, node: str, reported: Iterable[change_pb2.ChangeStatus]) -> None:
        """Record that a new stream of the node began, in which it listed these changes."""
        listed = {status.change_id: status for status in reported}
        for change in list(self.under_way.values()):
            if node in change.nodes:
                change.reconnected(node, lists_change=change.change_id in listed)
        for status in listed.values():
            self.report(node, status)

    def report(self, node: str, status: change_pb2.ChangeStatus) -> None:
        """Handle a node's report of a change's phase."""
        change = self.under_way.get(status.change_id)
        if change is not None:
            change.report(node, status)
            self.pass_directives(change)
        elif status.phase != change_pb2.CHANGE_PHASE_RELEASED and not self._is_closed(node, status):
            if self.late.knows_end(status.change_id):
                self._answer_late(node, status)
            else:
                self.late.add(node, status)

    def see_report(self, node: str, replica: Replica, report: report_pb2.ReplicaReport) -> None:
        if (change := self.of(replica)) is not None:
            was = change.state
            change.see_report(node, report)
            if change.state != was:
                self.pass_directives(change)

    def answered(self, node: str, answer: DeltaAnswer, *, now_s: float) -> None:
        change = self.under_way.get(answer.change_id)
        if change is not None:
            change.answered(node, answer.kind, answer.failure, now_s=now_s)
            self.pass_directives(change)
            return
        slot = self._cluster.slot(node, answer.replica)
        if slot is not None and (answer.kind == "resolved" or answer.failure is not None):
            slot.close_change(answer.change_id)

    def note_presence(self, node: str, state: NodeState.ValueType) -> None:
        for change in list(self.under_way.values()):
            if node in change.nodes:
                if state == NodeState.NODE_STATE_LOST:
                    change.lose(node)
                else:
                    change.regain(node)
                self.pass_directives(change)

    def pass_time(self, now_s: float) -> None:
        """Expire deadlines, and schedule retransmissions."""
        for change in list(self.under_way.values()):
            was = change.state
            for node in change.pass_time(now_s):
                self._cluster.links[node].slot(change.body.replica).resend(change.change_id)
                self._cluster.mark_sendable(node)
            if change.state != was:
                self.pass_directives(change)

    # --- Changes that have ended

    def found_late(self, change_id: str, body: redispatch_pb2.Redispatch | None) -> None:
        """Answer the nodes that mentioned a change without a coordinator.

        ``body`` is the stored re-dispatch, or None if the store has no such change.
        """
        if body is not None:
            self.late.remember(body)
        for node, status in self.late.take(change_id):
            if node in self._cluster.links:  # unless it is gone in the meantime
                self._answer_late(node, status)

    def _is_closed(self, node: str, status: change_pb2.ChangeStatus) -> bool:
        slot = self._cluster.slot(node, status.replica)
        return slot is not None and status.change_id in slot.closed

    def _answer_late(self, node: str, status: change_pb2.ChangeStatus) -> None:
        slot = self._cluster.links[node].reported_slot(status.replica)
        if slot is not None and slot.num_directives < MOST_OF_NODE:  # beyond that, nodes mention changes again later
            slot.set_directive(self.late.directive(status))
            self._cluster.mark_sendable(node)


def _gone(replica: str) -> failure_pb2.Failure:
    return ServiceError(
        Reason.ERROR_REASON_CHANGE_CANCELLED, f"{replica} was removed before the outcome of the change was known"
    ).to_proto()


class LateChanges:
    """Changes without a coordinator that nodes mention: known outcomes, and reports that await a read of the store."""

    def __init__(self) -> None:
        self._ends: OrderedDict[str, agent_service_pb2.ChangeResolved] = OrderedDict()  # by change id, oldest first
        self._waiting: dict[str, dict[str, change_pb2.ChangeStatus]] = {}  # reports by change id and node
        self._num_of_node = Counter[str]()

    def remember(self, body: redispatch_pb2.Redispatch) -> None:
        """Remember the outcome of a re-dispatch that has ended."""
        if body.state not in FINAL_REDISPATCHES:
            return
        is_done = body.state == redispatch_pb2.REDISPATCH_STATE_DONE
        moves = [one.status.moves for one in body.nodes if change_pb2.CHANGE_PART_AUTHORITY in one.parts]
        self._ends[body.change.change_id] = agent_service_pb2.ChangeResolved(
            change_id=body.change.change_id,
            outcome=Outcome.CHANGE_OUTCOME_FLIPPED if is_done else Outcome.CHANGE_OUTCOME_ABORTED,
            moves=moves[0] if moves else (),
        )
        if len(self._ends) > _ENDED_KEPT:
            self._ends.popitem(last=False)

    def knows_end(self, change_id: str) -> bool:
        return change_id in self._ends

    def add(self, node: str, status: change_pb2.ChangeStatus) -> None:
        """Add a report. Beyond the limits it is dropped, since the node will send it again."""
        if node not in self._waiting.get(status.change_id, {}):
            if self._num_of_node[node] >= MOST_OF_NODE or len(self._waiting) >= _MOST_LATE:
                return
            self._num_of_node[node] += 1
        self._waiting.setdefault(status.change_id, {})[node] = status

    @property
    def unknown(self) -> list[str]:
        """Ids of the changes to be read from the store."""
        return list(self._waiting)

    def take(self, change_id: str) -> Iterable[tuple[str, change_pb2.ChangeStatus]]:
        """Remove the reports of a change, and return them with the nodes that sent them."""
        taken = self._waiting.pop(change_id, {})
        for node in taken:
            self._num_of_node[node] -= 1
            if not self._num_of_node[node]:
                del self._num_of_node[node]
        return tuple(taken.items())

    def directive(self, status: change_pb2.ChangeStatus) -> Directive:
        """Return the directive that answers a node's report.

        A change without a record was never permitted to flip, so only the node's own report can determine its outcome.
        """
        step: Step | None = self._ends.get(status.change_id)
        if step is None and status.phase in (Phase.CHANGE_PHASE_FLIPPED, Phase.CHANGE_PHASE_ABORTED):
            flipped = status.phase == Phase.CHANGE_PHASE_FLIPPED
            step = agent_service_pb2.ChangeResolved(
                change_id=status.change_id,
                outcome=Outcome.CHANGE_OUTCOME_FLIPPED if flipped else Outcome.CHANGE_OUTCOME_ABORTED,
                moves=status.moves if flipped else (),
            )
        if step is None:
            message = f"the planner has no record of change {status.change_id}"
            failure = ServiceError(
                Reason.ERROR_REASON_CHANGE_UNKNOWN, message, metadata={"change_id": status.change_id}
            ).to_proto()
            step = agent_service_pb2.AbortChange(change_id=status.change_id, failure=failure)
        # An abort of an unknown change leads to no generation, but every delta must name one.
        return Directive(change_id=status.change_id, generation=status.generation + 1, step=step)
