"""One re-dispatch in two phases, as a state machine without I/O: node reports go in, directives for nodes come out.

    PREPARING --all READY--> COMMITTING --authority FLIPPED--> RELEASING --all RELEASED--> DONE
        | refused, failed, late,    | authority ABORTED             ^
        v lost, cancelled           v                               | authority FLIPPED
    ABORTING <----------------------+-------------------------------+ --authority ABORTED, all know--> ABORTED

Two rules make it safe. Permission to flip is sent only after COMMITTING is durable, so a later planner that reads
PREPARING knows that no node was permitted. And the outcome of a change is sent only after it is durable. The authority,
which forgets a change once it knows the outcome, is sent the outcome last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

from hetis.planner.convert.names import seconds_of
from hetis.planner.failures import Reason, ServiceError, invalid_field
from hetis.planner.fleet.agents.deltas import Directive, Step
from hetis.planner.store.records import FINAL_REDISPATCHES
from hetis.solver.cluster import node_of
from hetis.v1 import agent_service_pb2, change_pb2, failure_pb2, redispatch_pb2, replica_pb2, report_pb2
from hetis.v1.changes import FLIPPED, NodeChange

State = redispatch_pb2.RedispatchState
Phase = change_pb2.ChangePhase
Outcome = change_pb2.ChangeOutcome
ChangePart = change_pb2.ChangePart
Parts = Mapping[str, tuple[ChangePart.ValueType, ...]]
# States that the agent reports only once it has received a report from its engine.
_REPORTED = (
    report_pb2.ASSIGNMENT_STATE_LOADED,
    report_pb2.ASSIGNMENT_STATE_SERVING,
    report_pb2.ASSIGNMENT_STATE_DRAINING,
)
_ENOUGH_ANSWERS = 3  # acks of `resolved` without a RELEASED: the report was lost, and the node has forgotten the change


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A snapshot of a re-dispatch, taken when a write begins; ``body`` is a copy."""

    revision: int  # revision of the change, which counts the states that the store should have
    body: redispatch_pb2.Redispatch
    outcome: Outcome.ValueType  # the outcome as it was known when the write began


class ChangeCoordinator:
    """Coordinates one re-dispatch."""

    def __init__(self, body: redispatch_pb2.Redispatch, parts: Parts, *, now_s: float, again_s: float) -> None:
        """Begin a new change.

        Args:
            body: the re-dispatch with its change; not in the store yet.
            parts: the parts of each node, by node id.
            now_s: monotonic time.
            again_s: time after which a directive that was acknowledged but had no effect is sent again.
        """
        self.body = body  # the re-dispatch as it is now; `is_unsaved` returns whether the store is behind
        # Id of the node whose engine decides the outcome
        self.authority = next(node for node, its in parts.items() if ChangePart.CHANGE_PART_AUTHORITY in its)
        self.num_contradictions = 0  # reports of an authority that contradict its first one, which should never happen
        self._again_s = again_s
        self._deadline_s = now_s + seconds_of(body.change.prepare_timeout)  # time by which all nodes must be READY
        self._outcome = Outcome.CHANGE_OUTCOME_UNSPECIFIED  # the authority's decision, as far as it is known
        self._is_presumed = False  # whether the outcome was presumed, not reported by the authority
        self._forgotten: failure_pb2.Failure | None = None  # answer of an agent that forgot it may flip
        self._engine: report_pb2.ReplicaReport | None = None  # the last report of the authority's engine
        self._engine_is_new = False  # whether the engine was restarted since it prepared
        self._finished: set[str] = set()  # nodes that need no further messages
        self._lost: set[str] = set()  # nodes whose leases expired
        self._answers: dict[str, int] = {}  # number of answers to the last directive, by node
        self._answered_s: dict[str, float] = {}  # when each node last answered its directive
        self._revision = 1  # revision that the store should have
        self._saved = 0  # the revision that the store has
        self._durable: State.ValueType = State.REDISPATCH_STATE_UNSPECIFIED  # the state that the store has
        self._durable_outcome: Outcome.ValueType = Outcome.CHANGE_OUTCOME_UNSPECIFIED  # the outcome in the store
        body.state = State.REDISPATCH_STATE_PREPARING
        if not body.nodes:
            body.nodes.extend(redispatch_pb2.NodeChangeStatus(node=node, parts=its) for node, its in parts.items())
        # The change on each node, as last reported; UNSPECIFIED before the first report
        self._nodes = {
            one.node: NodeChange(change=body.change, parts=tuple(one.parts), status=one.status) for one in body.nodes
        }

    @classmethod
    def resumed(cls, body: redispatch_pb2.Redispatch, *, now_s: float, again_s: float) -> ChangeCoordinator:
        """Resume a change that an earlier planner left.

        It is cancelled if no node can have been permitted to flip.
        """
        state = body.state
        found = cls(body, {one.node: tuple(one.parts) for one in body.nodes}, now_s=now_s, again_s=again_s)
        body.state = found._durable = state
        authority = found._nodes[found.authority]
        if state == State.REDISPATCH_STATE_RELEASING:
            found._outcome = Outcome.CHANGE_OUTCOME_FLIPPED
        elif state == State.REDISPATCH_STATE_ABORTING and authority.phase == Phase.CHANGE_PHASE_ABORTED:
            found._outcome = Outcome.CHANGE_OUTCOME_ABORTED
            found._is_presumed = authority.status.failure.reason == Reason.ERROR_REASON_CHANGE_UNKNOWN
        found._durable_outcome, found._saved = found._outcome, found._revision
        if state == State.REDISPATCH_STATE_PREPARING:
            why = "the planner restarted before all nodes were ready"
            found.call_off(_failure(Reason.ERROR_REASON_CHANGE_CANCELLED, why))
        return found

    # --- Outputs

    @property
    def change_id(self) -> str:
        return self.body.change.change_id

    @property
    def state(self) -> State.ValueType:
        return self.body.state

    @property
    def is_unsaved(self) -> bool:
        """Return whether the store is behind. Until it has caught up, `directives` follow the stored state."""
        return self._saved != self._revision

    @property
    def has_ended(self) -> bool:
        """Return whether the change has ended and the store knows it."""
        return self.body.state in FINAL_REDISPATCHES and not self.is_unsaved

    @property
    def was_flipped(self) -> bool:
        return self._outcome == Outcome.CHANGE_OUTCOME_FLIPPED

    @property
    def nodes(self) -> Iterable[str]:
        """Ids of the nodes that take part."""
        return self._nodes.keys()

    def to_save(self) -> Saving:
        """Return a snapshot for the store."""
        return Saving(revision=self._revision, body=deepcopy(self.body), outcome=self._outcome)

    def saved(self, saving: Saving) -> None:
        """Record that ``saving`` is durable in the store."""
        self._saved = saving.revision
        self._durable, self._durable_outcome = saving.body.state, saving.outcome
        self._advance()

    def directives(self) -> dict[str, Directive]:
        """Return the last directive that each node should have received; nodes not listed need nothing more."""
        knows_end = self._durable_outcome != Outcome.CHANGE_OUTCOME_UNSPECIFIED
        match self._durable:
            case State.REDISPATCH_STATE_PREPARING if self.body.state != State.REDISPATCH_STATE_ABORTING:
                change = self.body.change
                return {
                    node: self._directive(agent_service_pb2.PrepareChange(change=change, parts=one.parts))
                    for node, one in self._nodes.items()
                }
            case State.REDISPATCH_STATE_COMMITTING:
                commit = agent_service_pb2.CommitChange(change_id=self.change_id)
                return {self.authority: self._directive(commit)}
            case State.REDISPATCH_STATE_PREPARING | State.REDISPATCH_STATE_ABORTING if not knows_end:
                abort = agent_service_pb2.AbortChange(change_id=self.change_id, failure=self.body.failure)
                return {node: self._directive(abort) for node in self._nodes}
            case State.REDISPATCH_STATE_RELEASING | State.REDISPATCH_STATE_ABORTING if (
                self._outcome == self._durable_outcome
            ):
                return self._resolved()
            case _:
                return {}

    # --- Inputs

    def report(self, node: str, status: change_pb2.ChangeStatus) -> None:
        """Handle a node's report of its phase; a report of an earlier phase than its last one is stale."""
        if (one := self._nodes.get(node)) is None:
            return
        if (
            self._is_presumed
            and one.is_authority
            and status.phase in FLIPPED
            and self.body.state not in FINAL_REDISPATCHES
        ):
            self._correct()
            one.status.Clear()
        if not one.may_become(status.phase):
            if one.is_authority and one.contradicts(status):
                self.num_contradictions += 1
            if status.phase == Phase.CHANGE_PHASE_RELEASED:  # it holds nothing of the change
                self._finished.add(node)
                self._advance()
            return
        one.status.CopyFrom(status)
        if one.is_authority and status.phase in FLIPPED:
            self._end(Outcome.CHANGE_OUTCOME_FLIPPED)
        elif one.is_authority and status.phase == Phase.CHANGE_PHASE_ABORTED:
            self._end(Outcome.CHANGE_OUTCOME_ABORTED, status.failure)
        elif status.phase == Phase.CHANGE_PHASE_ABORTED:
            self.call_off(status.failure)
        if status.phase == Phase.CHANGE_PHASE_RELEASED:
            self._finished.add(node)
        elif status.phase == Phase.CHANGE_PHASE_READY and one.is_authority:
            self._engine_is_new = False  # even if the engine was restarted: this run has the change
        self._advance()

    def answered(self, node: str, kind: str, failure: failure_pb2.Failure | None, *, now_s: float) -> None:
        """Handle a node's answer to a directive, accepted or refused; ``kind`` is the directive's."""
        directive = self.directives().get(node)
        if directive is None or directive.kind != kind:
            return  # a newer directive is due
        self._answered_s[node] = now_s
        self._answers[node] = self._answers.get(node, 0) + 1
        is_unknown = failure is not None and failure.reason == Reason.ERROR_REASON_CHANGE_UNKNOWN
        is_other_end = failure is not None and failure.reason == Reason.ERROR_REASON_CHANGE_PHASE
        if kind == "prepare" and failure is not None:
            self.call_off(failure)
        elif kind == "abort" and is_unknown and node == self.authority:
            self._end(Outcome.CHANGE_OUTCOME_ABORTED, failure)  # it was not permitted to flip, so it did not
        elif kind == "commit" and is_unknown and node == self.authority:
            self._forgotten = failure  # the agent forgot it; if the engine has flipped, it will report that
            self._presume()
        elif kind == "resolved" and is_other_end:
            self.num_contradictions += 1  # the node will never accept another outcome, however often it is sent
            self._finished.add(node)
        elif kind == "resolved" and self._knows_outcome:
            was_aborted = self._outcome == Outcome.CHANGE_OUTCOME_ABORTED
            if is_unknown or (failure is None and (was_aborted or self._answers[node] >= _ENOUGH_ANSWERS)):
                self._finished.add(node)
        self._advance()

    def see_report(self, node: str, report: report_pb2.ReplicaReport) -> None:
        """Handle a node's report, which shows whether the authority's engine is still the run that prepared."""
        if node != self.authority or not (report.engine_id or report.assignment_state in _REPORTED):
            return
        before, self._engine = self._engine, report
        if before is not None and _is_another_run(before, report):
            self._engine_is_new = True
            self._presume()
            self._advance()

    def reconnected(self, node: str, *, lists_change: bool) -> None:
        """Record that a new stream of the node began, and whether its Hello lists the change."""
        self._answers.pop(node, None)
        self._answered_s.pop(node, None)
        if not lists_change and self._knows_outcome and node in self._nodes:
            self._finished.add(node)
        self._advance()

    def lose(self, node: str) -> None:
        """Record that the node's lease expired."""
        if node not in self._nodes or node in self._lost:
            return
        self._lost.add(node)
        self.call_off(_failure(Reason.ERROR_REASON_DEVICE_UNAVAILABLE, f"node {node} was lost", device=node))
        self._advance()

    def regain(self, node: str) -> None:
        self._lost.discard(node)

    def call_off(self, failure: failure_pb2.Failure) -> None:
        """Cancel the change unless it is too late: once it is COMMITTING, the authority decides."""
        if self.body.state == State.REDISPATCH_STATE_PREPARING:
            self.body.failure.CopyFrom(failure)
            self._enter(State.REDISPATCH_STATE_ABORTING)

    def give_up(self, failure: failure_pb2.Failure) -> None:
        """End the change because its replica is removed, so that its outcome no longer matters."""
        if self.body.state not in FINAL_REDISPATCHES:
            self._enter(State.REDISPATCH_STATE_DONE if self.was_flipped else State.REDISPATCH_STATE_ABORTED)
            if not self.was_flipped and not self.body.HasField("failure"):
                self.body.failure.CopyFrom(failure)

    def pass_time(self, now_s: float) -> list[str]:
        """Cancel the change if it is late; return the nodes to which the last directive should be sent again."""
        if self.body.state == State.REDISPATCH_STATE_PREPARING and now_s >= self._deadline_s:
            late = sorted(node for node in self._nodes if not self._is_ready(node))
            message = f"not ready in time: {', '.join(late)}" if late else "ready only after the deadline"
            self.call_off(_failure(Reason.ERROR_REASON_PREPARE_EXPIRED, message))
        if self._durable == State.REDISPATCH_STATE_PREPARING == self.body.state:
            return []  # nodes report progress by themselves, and the deadline ends the wait
        again = [
            node
            for node, answered_s in self._answered_s.items()
            if node not in self._finished and now_s - answered_s >= self._again_s
        ]
        for node in again:
            del self._answered_s[node]
        return again

    # --- Internals

    @property
    def _knows_outcome(self) -> bool:
        return self._outcome != Outcome.CHANGE_OUTCOME_UNSPECIFIED

    def _is_ready(self, node: str) -> bool:
        return self._nodes[node].phase == Phase.CHANGE_PHASE_READY

    def _end(self, outcome: Outcome.ValueType, failure: failure_pb2.Failure | None = None) -> None:
        """Accept the authority's decision; its first one is final."""
        if self._knows_outcome or self.body.state in FINAL_REDISPATCHES:
            return
        self._outcome = outcome
        if outcome == Outcome.CHANGE_OUTCOME_FLIPPED:
            self.body.ClearField("failure")
            self._enter(State.REDISPATCH_STATE_RELEASING)
            return
        self._enter(State.REDISPATCH_STATE_ABORTING)
        if not self.body.HasField("failure") and failure is not None:
            self.body.failure.CopyFrom(failure)
        authority = self._nodes[self.authority]
        if authority.phase != Phase.CHANGE_PHASE_ABORTED:
            self._is_presumed = True
            presumed = NodeChange.first_status(self.body.change)
            presumed.phase = Phase.CHANGE_PHASE_ABORTED
            if failure is not None:
                presumed.failure.CopyFrom(failure)
            authority.status.CopyFrom(presumed)

    def _enter(self, state: State.ValueType) -> None:
        self.body.state = state
        self._revision += 1
        self._answers.clear()
        self._answered_s.clear()

    def _presume(self) -> None:
        """Presume that the change was aborted if its engine is gone, and with it whatever was flipped."""
        if self._forgotten is not None and self._engine_is_new:
            self._end(Outcome.CHANGE_OUTCOME_ABORTED, self._forgotten)

    def _correct(self) -> None:
        """Undo a wrong presumption: the change had flipped after all, and some nodes may know the wrong outcome."""
        self.num_contradictions += 1
        self._outcome = Outcome.CHANGE_OUTCOME_UNSPECIFIED
        self._is_presumed = False
        self._finished.clear()

    def _advance(self) -> None:
        state = self.body.state
        if state == State.REDISPATCH_STATE_PREPARING and all(map(self._is_ready, self._nodes)):
            self._enter(State.REDISPATCH_STATE_COMMITTING)
        elif state == State.REDISPATCH_STATE_ABORTING and not self._knows_outcome and self.authority in self._lost:
            # No node was permitted to flip, so none did.
            self._end(Outcome.CHANGE_OUTCOME_ABORTED, self.body.failure)
        if state in FINAL_REDISPATCHES or not self._knows_outcome or self.is_unsaved:
            return
        if all(node in self._finished or node in self._lost for node in self._nodes):
            self._enter(State.REDISPATCH_STATE_DONE if self.was_flipped else State.REDISPATCH_STATE_ABORTED)

    def _resolved(self) -> dict[str, Directive]:
        resolved = agent_service_pb2.ChangeResolved(
            change_id=self.change_id, outcome=self._outcome, moves=self._nodes[self.authority].status.moves
        )
        others = [node for node in self._nodes if node != self.authority]
        are_done = all(node in self._finished or node in self._lost for node in others)
        receivers = [*others, self.authority] if are_done else others
        return {node: self._directive(resolved) for node in receivers if node not in self._finished}

    def _directive(self, step: Step) -> Directive:
        return Directive(change_id=self.change_id, generation=self.body.change.generation, step=step)


def _failure(reason: Reason.ValueType, message: str, **metadata: str) -> failure_pb2.Failure:
    return ServiceError(reason, message, metadata=metadata).to_proto()


def _is_another_run(before: report_pb2.ReplicaReport, now: report_pb2.ReplicaReport) -> bool:
    if before.engine_id and now.engine_id:
        return before.engine_id != now.engine_id
    return now.num_steps < before.num_steps


def parts_of(
    change: change_pb2.Change,
    shape: replica_pb2.ReplicaPlan,
    *,
    primary_node: str,
    moves_heads: Callable[[str], bool] = lambda node: True,
) -> Parts:
    """Return the parts of each node by node id, the authority's first.

    A node that does not move heads has no part itself: its attention workers belong to the primary's engine, which
    reserves, copies and frees there, so the primary's node has the part. Raises INVALID_FIELD if a move names a device
    that is not in the stage's copy.
    """
    gpus = gpus_of_copy(shape, change.stage, change.copy)
    found: dict[str, set[ChangePart.ValueType]] = {primary_node: {ChangePart.CHANGE_PART_AUTHORITY}}
    for move in change.moves:
        for device, part in (
            (move.source, ChangePart.CHANGE_PART_SOURCE),
            (move.target, ChangePart.CHANGE_PART_TARGET),
        ):
            if device not in gpus:
                raise invalid_field(f"change.moves[{move.number}]", f"{device} is not a device of the stage's copy")
            for node in map(node_of, gpus[device]):
                found.setdefault(node if moves_heads(node) else primary_node, set()).add(part)
    return {node: tuple(sorted(parts)) for node, parts in found.items()}


def gpus_of_copy(shape: replica_pb2.ReplicaPlan, stage: int, copy: int) -> dict[str, list[str]]:
    """Return the GPUs of every device of one copy of a stage, by the device's first GPU, the primary first."""
    if stage >= len(shape.stages) or copy >= shape.stages[stage].copies:
        raise invalid_field("change.stage", f"the replica has no copy {copy} of stage {stage}")
    one = shape.stages[stage]
    primary = list(one.devices[copy * one.tp : (copy + 1) * one.tp])
    gpus = {primary[0]: primary}
    for pool in shape.attention_workers:
        if pool.stage == stage:
            each = len(pool.devices) // one.copies
            gpus |= {device: [device] for device in pool.devices[copy * each : (copy + 1) * each]}
    return gpus
