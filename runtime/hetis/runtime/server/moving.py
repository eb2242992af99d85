"""Who moves heads in `hetis-serve`, and what became of it, as a value for metrics."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.runtime.moving.hauler import Hauler
from hetis.runtime.moving.redispatch import Redispatch
from hetis.runtime.server.asked import RedispatchMode
from hetis.runtime.steering.engine import RealEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class MovingView:
    """Moves since the engine started.

    Attributes:
        mode: who decides.
        begun, flipped, aborted: changes.
        copied_bytes: KV that was sent for them.
        looks, moves: of the engine's own re-dispatch; what it decided.
        relieved: times that a device without free pages was relieved by moves that the solver chose.
        permission: how far the planner's change is: ``none``, ``preparing``, ``ready``, ``permitted``.
        epoch: the planner's newest that was obeyed; 0: none.
    """

    mode: RedispatchMode = RedispatchMode.OFF
    begun: int = 0
    flipped: int = 0
    aborted: int = 0
    copied_bytes: int = 0
    looks: int = 0
    moves: int = 0
    relieved: int = 0
    permission: str = "none"
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moving:
    """What moves heads of one engine.

    Attributes:
        redispatch: the engine's own, one for each stage; empty: it leaves that to others.
        steered: the engine under the contract; None: no agent can ask for it.
    """

    mode: RedispatchMode
    hauler: Hauler
    redispatch: tuple[Redispatch, ...] = ()
    steered: RealEngine | None = None

    def view(self) -> MovingView:
        counts, own, steered = self.hauler.counts, self.redispatch, self.steered
        return MovingView(
            mode=self.mode,
            begun=counts.begun_changes,
            flipped=counts.flipped_changes,
            aborted=counts.aborted_changes,
            copied_bytes=counts.copied_bytes,
            looks=sum(one.num_looks for one in own),
            moves=sum(one.num_moves for one in own),
            relieved=sum(one.num_relieved for one in own),
            permission=steered.permission if steered else "none",
            epoch=steered.newest_epoch if steered else 0,
        )
