"""The fence against planners whose leadership term is over."""

from __future__ import annotations

from hetis.runtime.agent.outbox import Outbox
from hetis.runtime.agent.replica_state import NODE_PART, epoch_to_bytes


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
