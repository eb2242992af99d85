"""Changes of heads that nodes mention after they have ended, or of which the planner knows nothing."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.deltas import Directive, Step
from hetis.planner.store.records import FINAL_REDISPATCHES
from hetis.v1 import agent_service_pb2, change_pb2, redispatch_pb2

Phase = change_pb2.ChangePhase
Outcome = change_pb2.ChangeOutcome
_MOST = 10_000
_ENDED_KEPT = 1000
MOST_OF_NODE = 100  # a node has one change under way per replica, and few replicas


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
            if self._num_of_node[node] >= MOST_OF_NODE or len(self._waiting) >= _MOST:
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
