"""Changes that a node mentions although they are over, or that this planner never knew."""

from __future__ import annotations

from collections.abc import Iterable

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.changes import Outcome, Phase
from hetis.planner.fleet.deltas import Directive
from hetis.v1 import agent_service_pb2, change_pb2

_MOST = 10_000
MOST_OF_NODE = 100  # per node; a node has one change per replica under way, and few replicas


class LateChanges:
    """Reports of changes that nobody drives, until the store was asked for their outcome."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, change_pb2.ChangeStatus]] = {}
        self._num_of_node: dict[str, int] = {}

    def add(self, node: str, status: change_pb2.ChangeStatus) -> None:
        """Add a report. Beyond the limits it is dropped, as the node will send it again."""
        known = self._waiting.get(status.change_id, {})
        if node not in known:
            num = self._num_of_node.get(node, 0)
            if num >= MOST_OF_NODE or len(self._waiting) >= _MOST:
                return
            self._num_of_node[node] = num + 1
        self._waiting.setdefault(status.change_id, {})[node] = status

    @property
    def unknown(self) -> list[str]:
        """Ids of the changes to look up in the store."""
        return list(self._waiting)

    def take(self, change_id: str) -> Iterable[tuple[str, change_pb2.ChangeStatus]]:
        """Remove a change; return the nodes that mentioned it, with their reports."""
        taken = self._waiting.pop(change_id, {})
        for node in taken:
            self._num_of_node[node] -= 1
            if not self._num_of_node[node]:
                del self._num_of_node[node]
        return tuple(taken.items())

    def directive(
        self,
        status: change_pb2.ChangeStatus,
        *,
        outcome: Outcome.ValueType | None,
        moves: Iterable[change_pb2.MoveResult],
    ) -> Directive:
        """Return the directive for the node. ``outcome`` is that of the change, None if there is no record of it.

        A change that was never recorded was never permitted to flip, so only the node's own report can end it.
        """
        if outcome is None and status.phase == Phase.CHANGE_PHASE_FLIPPED:
            outcome, moves = Outcome.CHANGE_OUTCOME_FLIPPED, status.moves
        elif outcome is None and status.phase == Phase.CHANGE_PHASE_ABORTED:
            outcome = Outcome.CHANGE_OUTCOME_ABORTED
        step: agent_service_pb2.ChangeResolved | agent_service_pb2.AbortChange
        if outcome is not None:
            step = agent_service_pb2.ChangeResolved(change_id=status.change_id, outcome=outcome, moves=moves)
        else:
            failure = ServiceError(
                Reason.ERROR_REASON_CHANGE_UNKNOWN,
                f"the planner has no record of change {status.change_id}",
                metadata={"change_id": status.change_id},
            )
            step = agent_service_pb2.AbortChange(change_id=status.change_id, failure=failure.to_proto())
        # An abort of an unknown change leads to no generation, but a delta has to name one.
        return Directive(change_id=status.change_id, generation=status.generation + 1, step=step)
