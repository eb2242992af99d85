"""One replica on one node: takes what the planner wants or refuses it, and hears what the engine says of itself.

Deltas change what is wanted (`hetis.runtime.agent.held`); `hetis.runtime.agent.engine_steps` brings the engine there.
"""

from __future__ import annotations

from hetis.runtime.agent.actions import EngineResponse
from hetis.runtime.agent.admissible import refusal_of
from hetis.runtime.agent.book import ReplicaBook, add_moves
from hetis.runtime.agent.checks import wrong_fields
from hetis.runtime.agent.engine_steps import EngineSteps
from hetis.runtime.agent.fence import Fence
from hetis.runtime.agent.held import HeldChange, HeldReplica, Wanted
from hetis.runtime.agent.outbox import Outbox
from hetis.runtime.executor.refusals import failure_of
from hetis.v1.agent_service_pb2 import AgentCapability, ConnectNodeRequest, Delta, DeltaAck, DeltaNack
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePhase, ChangeStatus
from hetis.v1.executor_service_pb2 import CopyMovesResponse
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.replica_pb2 import Assignment
from hetis.v1.report_pb2 import AssignmentState, ReplicaReport


class ReplicaDesk:
    """The agent's work on one replica.

    Args:
        held: what is held of it, as read from disk or empty.
        capabilities: what the agent can do for its engine.
        clock: names what times count on, see `HeldReplica.to_bytes`.
    """

    def __init__(
        self,
        held: HeldReplica,
        *,
        capabilities: frozenset[AgentCapability.ValueType],
        clock: str,
        fence: Fence,
        outbox: Outbox,
    ) -> None:
        self.held = held
        self._can = capabilities
        self._outbox = outbox
        self._book = ReplicaBook(held, can=capabilities, clock=clock, outbox=outbox)
        self._steps = EngineSteps(self._book, fence=fence, outbox=outbox)

    # --- the planner

    def handle(self, delta: Delta, *, epoch: int, now_s: float) -> None:
        """A delta of an epoch that may change things: stores and acknowledges it, or refuses it."""
        if delta.nonce and delta.nonce == self.held.nonce and self.held.answer is not None:
            self._outbox.send(self.held.answer)
            return
        kind = delta.WhichOneof("change")
        failure = wrong_fields(delta) or refusal_of(delta, self.held, self._can)
        if failure is not None:
            self.refuse(delta, failure)
            return
        told: HeldChange | None = None
        if kind in ("assignment", "removal"):
            self._take_assignment(delta, epoch=epoch)
        elif kind == "prepare":
            told = self._take_prepare(delta, epoch=epoch, now_s=now_s)
        else:
            told = self._take_directive(delta, epoch=epoch, now_s=now_s)
        self.held.nonce = delta.nonce
        self.held.answer = ConnectNodeRequest(
            ack=DeltaAck(nonce=delta.nonce, replica=delta.replica, generation=self.held.held_generation)
        )
        self._steps.wait_no_longer(now_s)
        self._book.persist()
        self._outbox.send(self.held.answer)
        if told is not None:
            self._book.tell(told)
        self.advance(now_s)

    def refuse(self, delta: Delta, failure: Failure) -> None:
        """Everything stays as it was; the same delta is refused again, whatever happens in between."""
        held = self.held
        held.nonce = delta.nonce
        held.answer = ConnectNodeRequest(
            nack=DeltaNack(nonce=delta.nonce, replica=delta.replica, generation=held.held_generation, failure=failure)
        )
        if held.generation:  # nothing was ever held: a file would only keep a mistake
            self._book.persist()
        self._outbox.send(held.answer)

    def _take_assignment(self, delta: Delta, *, epoch: int) -> None:
        held = self.held
        if delta.generation == held.generation:
            held.epoch = epoch  # the same again
            return
        self._book.give_up_open(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "a new assignment came")
        held.generation, held.epoch = delta.generation, epoch
        before, new = held.assignment or Assignment(), delta.assignment
        held.is_anew = (list(before.stages), list(before.devices)) != (list(new.stages), list(new.devices))
        held.assignment = None
        if delta.HasField("assignment"):
            held.assignment = Assignment()
            held.assignment.CopyFrom(new)
        held.is_applied, held.failure = False, None
        held.assignment_state = self._book.first_state()

    def _take_prepare(self, delta: Delta, *, epoch: int, now_s: float) -> HeldChange:
        known = self.held.changes.get(delta.prepare.change.change_id)
        if known is not None:
            return known
        change = Change()
        change.CopyFrom(delta.prepare.change)
        timeout = change.prepare_timeout
        taken = HeldChange(
            change=change,
            parts=tuple(dict.fromkeys(delta.prepare.parts)),
            epoch=epoch,
            deadline_s=now_s + timeout.seconds + timeout.nanos / 1e9,
            status=self._book.status(change, ChangePhase.CHANGE_PHASE_PREPARING),
        )
        self.held.changes[taken.id] = taken
        return taken

    def _take_directive(self, delta: Delta, *, epoch: int, now_s: float) -> HeldChange | None:
        """commit, abort or resolved. Returns the change if its status is to be told now."""
        kind = delta.WhichOneof("change")
        change_id = (
            delta.commit.change_id
            if kind == "commit"
            else delta.abort.change_id
            if kind == "abort"
            else delta.resolved.change_id
        )
        change = self.held.changes.get(change_id)
        if change is None:
            change = self._book.unheard(change_id, epoch=epoch, now_s=now_s)
        change.epoch = epoch
        if kind == "resolved":
            change.is_resolved = True
            flipped = delta.resolved.outcome == ChangeOutcome.CHANGE_OUTCOME_FLIPPED
            if flipped and not change.has_ended:
                change.wanted = Wanted.RELEASED
                change.change.generation = change.change.generation or delta.generation
                del change.status.moves[:]
                change.status.moves.extend(delta.resolved.moves)
                return None
            if not flipped and change.is_open:
                self._book.want_abort(
                    change, failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "the authority aborted the change")
                )
                return None
        elif kind == "commit" and change.phase == ChangePhase.CHANGE_PHASE_READY:
            if change.wanted is Wanted.PREPARED:
                change.wanted = Wanted.FLIPPED
            return None
        elif kind == "abort" and change.is_open:
            self._book.want_abort(change, delta.abort.failure)
            return None
        return change

    def forget_assignment(self) -> None:
        """An old planner gave it, as the engine knows: nothing is held, so that the present one sends its own."""
        self.held.assignment, self.held.generation, self.held.is_applied = None, 0, True
        self.held.nonce, self.held.answer = "", None
        self._book.persist()

    # --- time

    def tick(self, now_s: float) -> None:
        """Ends what was prepared for too long, forgets what ended long ago, tries again what failed."""
        self._book.look_at_time(now_s)
        self.advance(now_s)

    def next_s(self) -> float:
        """When `tick` is due; infinity: not by itself."""
        return min(self._book.next_deadline_s(), self._steps.next_s())

    # --- the engine

    def advance(self, now_s: float) -> None:
        """Makes the next call of the engine, if one is due and none is being waited for."""
        self._steps.advance(now_s)

    def waits_for(self, number: int) -> bool:
        return self._steps.waits_for(number)

    def is_applying(self) -> bool:
        """Whether the call that is being waited for is of the assignment."""
        return self._steps.is_applying()

    def progressed(self, response: CopyMovesResponse, now_s: float) -> None:
        """The copy goes on."""
        self._steps.progressed(response, now_s)

    def answered(self, answer: EngineResponse | Failure, now_s: float) -> None:
        """What the engine answered to the call that is being waited for."""
        self._steps.answered(answer, now_s)

    def hear_change(self, said: ChangeStatus, now_s: float) -> None:
        """What the engine's report says of a change: how it ended may have passed the agent by."""
        change = self.held.changes.get(said.change_id)
        ended = said.phase in (
            ChangePhase.CHANGE_PHASE_FLIPPED,
            ChangePhase.CHANGE_PHASE_ABORTED,
            ChangePhase.CHANGE_PHASE_RELEASED,
        )
        if change is None:
            if said.phase not in (ChangePhase.CHANGE_PHASE_ABORTED, ChangePhase.CHANGE_PHASE_RELEASED):
                self._adopt(said, now_s)
            return
        if not ended or not change.may_become(said.phase):
            return
        add_moves(change, said.moves)
        change.status.step = change.status.step or said.step
        if said.HasField("failure"):
            change.why = said.failure
        self._book.enter(change, said.phase, now_s=now_s)

    def _adopt(self, said: ChangeStatus, now_s: float) -> None:
        """A change that the engine has and the agent lost the record of: its time to prepare is not known."""
        change = self._book.unheard(said.change_id, epoch=0, now_s=now_s)
        if said.phase == ChangePhase.CHANGE_PHASE_FLIPPED:
            change.change.generation = said.generation
            change.status.step = said.step
            add_moves(change, said.moves)
            self._book.enter(change, said.phase, now_s=now_s)
        else:
            self._book.want_abort(
                change,
                failure_of(
                    ErrorReason.ERROR_REASON_PREPARE_EXPIRED, f"the agent lost its record of change {said.change_id}"
                ),
            )
            self._book.persist()

    def engine_restarted(self, now_s: float) -> None:
        """All KV is gone: what is held is applied again, what was under way is given up."""
        if self.held.assignment is not None:
            self.held.is_applied, self.held.failure = False, None
            self.held.assignment_state = self._book.first_state()
        self._steps.forget_call()
        self._steps.wait_no_longer(now_s)
        self._book.give_up_open(ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE, "the engine restarted")
        self._book.persist()

    # --- telling

    def statuses(self) -> list[ChangeStatus]:
        """Of all changes that are remembered."""
        return [change.status for change in self.held.changes.values()]

    def tell_unresolved(self) -> None:
        """Says again how far changes are, until a ``resolved`` delta came."""
        for change in self.held.changes.values():
            if not change.is_resolved or not change.has_ended:
                self._book.tell(change)

    def report(self, engine: ReplicaReport | None) -> ReplicaReport:
        """The part of the replica on this node, by what the engine says and what the agent holds.

        An engine that speaks of a replica has taken it in its present run, so it need not have answered to the last
        assignment, nor to this run of the agent: a node that serves is not said to load because it is told more.
        """
        report = self._unsaid(self.held.assignment_state)
        is_steered = AgentCapability.AGENT_CAPABILITY_ASSIGN in self._can
        is_told = self.held.is_applied or not self.held.is_anew or not is_steered
        if engine is not None and is_told and self.held.failure is None:
            report.CopyFrom(engine)
            report.replica, report.generation = self.held.replica, self.held.held_generation
        if self.held.failure is not None:
            report.failure.CopyFrom(self.held.failure)
        return report

    def report_anew(self) -> ReplicaReport:
        """As `report` when the engine has just begun: without anything that was there before."""
        return self._unsaid(self._book.first_state())

    def _unsaid(self, state: AssignmentState.ValueType) -> ReplicaReport:
        held = self.held
        return ReplicaReport(replica=held.replica, assignment_state=state, generation=held.held_generation)
