"""Re-dispatch in the loop: when the stage has drifted from its ideal, or memory fills, the solver says what moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hetis.runtime.moving.hauler import Hauler, WantedMove

if TYPE_CHECKING:
    from hetis.solver.redispatch.result import Move
    from hetis.solver.redispatch.watch import Watch

MOVE_S = 30.0  # that a change of our own may take


def _new_watch() -> Watch:
    from hetis.solver.redispatch.watch import Watch

    return Watch()


@dataclass(slots=True, kw_only=True)
class Redispatch:
    """Looks at one engine's stage now and then, and has the hauler carry what pays.

    Attributes:
        hauler: what moves heads; looks are put off while it carries anything.
        link_byte_s: seconds per byte into or out of each device, shape [D].
        theta: share above the ideal makespan at which a look is worth it.
        every_steps: between two looks.
    """

    hauler: Hauler
    link_byte_s: npt.NDArray[np.float64]
    theta: float = 0.5
    every_steps: int = 16
    num_looks: int = 0
    num_moves: int = 0
    _looked_at: int = 0
    _watch: Watch = field(default_factory=_new_watch)

    def __post_init__(self) -> None:
        self.hauler.engine.between_steps.append(self.advance)

    def advance(self) -> None:
        """Looks, if it is time."""
        engine = self.hauler.engine
        is_due = engine.num_steps >= self._looked_at + self.every_steps
        if not is_due or self.hauler.open_changes or not len(engine.placement):
            return
        self._looked_at = engine.num_steps
        self.look()

    def look(self) -> None:
        """Starts the moves of the first wave, if triggers fire and any pay; later waves come with later looks."""
        from hetis.solver.dispatch.solve import Dispatcher
        from hetis.solver.redispatch.problem import RedispatchProblem
        from hetis.solver.redispatch.solve import Redispatcher
        from hetis.solver.redispatch.triggers import triggers

        engine, state = self.hauler.engine, self.hauler.engine.placement.state
        snapshot, dispatcher = state.snapshot(), Dispatcher(state.stage)
        fired = triggers(snapshot, dispatcher, theta=self.theta)
        if not self._watch.due(snapshot, fired):
            return
        self.num_looks += 1
        problem = RedispatchProblem(
            snapshot=snapshot, num_layers=engine.stage.shape.layers, link_byte_s=self.link_byte_s
        )
        moves = [move for move in Redispatcher(dispatcher).solve(problem).moves if move.wave == 0]
        self._watch.looked(snapshot, fired, moved=bool(moves))
        state.mark_seen()
        bundles: dict[int, list[Move]] = {}
        for move in moves:
            bundles.setdefault(move.together, []).append(move)
        for bundle in bundles.values():
            self.num_moves += len(bundle)
            self.hauler.reserve(self._wanted(bundle), prepare_s=MOVE_S, permitted_s=MOVE_S)

    def _wanted(self, bundle: list[Move]) -> list[WantedMove]:
        """Which heads: the solver counts them, the engine names them. The first of those on the source go."""
        taken: set[int] = set()
        wanted = []
        for move in bundle:
            owners = self.hauler.engine.placement.heads(int(move.request))
            heads = [head for head, owner in enumerate(owners) if owner == move.source and head not in taken]
            chosen = tuple(heads[: move.groups])
            taken |= set(chosen)
            wanted.append(WantedMove(int(move.request), chosen, move.target, move.together))
        return wanted
