"""Re-dispatch in the loop: when the stage has drifted from its ideal, or memory fills, the solver says what moves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hetis.runtime.moving.hauler import Hauler, WantedMove

if TYPE_CHECKING:
    from hetis.runtime.engine.placement import Placement
    from hetis.solver.dispatch.problem import Stage as StageCosts
    from hetis.solver.dispatch.snapshot import StateSnapshot
    from hetis.solver.dispatch.solve import Dispatcher
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
        link_byte_s: seconds per byte into or out of each device of the stage, shape [D].
        stage: the engine's number of the stage (or copy of it).
        theta: share above the ideal makespan at which a look is worth it.
        every_steps: between two looks.
        least_steps: between two looks where costs have changed in between.
        num_looks, num_moves: times that the solver was asked, and moves that it chose.
        num_relieved: times that its moves emptied a full device.
    """

    hauler: Hauler
    link_byte_s: npt.NDArray[np.float64]
    stage: int = 0
    theta: float = 0.5
    every_steps: int = 16
    least_steps: int = 8
    num_looks: int = 0
    num_moves: int = 0
    num_relieved: int = 0
    _looked_at: int = 0
    _costs: StageCosts = field(init=False)  # at the last look
    _watch: Watch = field(default_factory=_new_watch)

    def __post_init__(self) -> None:
        self._costs = self._placement.costs
        self.hauler.engine.between_steps.append(self.advance)
        self.hauler.engine.relieve[self.stage] = self.relieve

    def advance(self) -> None:
        """Looks, if it is time."""
        engine, costs = self.hauler.engine, self._placement.costs
        after = self.every_steps if costs is self._costs else min(self.least_steps, self.every_steps)
        if engine.num_steps < self._looked_at + after or self.hauler.open_changes or not len(self._placement):
            return
        self._looked_at, self._costs = engine.num_steps, costs
        self.look()

    def look(self) -> None:
        """Starts the moves of the first wave, if triggers fire and any pay; later waves come with later looks."""
        from hetis.solver.dispatch.solve import Dispatcher
        from hetis.solver.redispatch.triggers import triggers

        state, snapshot = self._placement.state, self._snapshot()
        dispatcher = Dispatcher(snapshot.stage)
        fired = triggers(snapshot, dispatcher, theta=self.theta)
        if not self._watch.due(snapshot, fired):
            return
        bundles = self._solve(dispatcher, snapshot)
        self._watch.looked(snapshot, fired, moved=bool(bundles))
        state.mark_seen()
        for bundle in bundles:
            self.hauler.reserve(self._wanted(bundle), prepare_s=MOVE_S, permitted_s=MOVE_S)

    def relieve(self, number: int) -> bool:
        """A device of this request has no page for its next position: moves that the solver chooses are made at once.

        Returns whether there is a page now. The caller has to do something else otherwise.
        """
        from hetis.solver.dispatch.solve import Dispatcher

        placement = self._placement
        if placement.moves:
            return False  # what is under way is given up first
        full, snapshot = frozenset(map(placement.group.place, placement.full_devices(number))), self._snapshot()
        for bundle in self._solve(Dispatcher(snapshot.stage), snapshot, full=full):
            change = self.hauler.reserve(self._wanted(bundle), prepare_s=MOVE_S)
            if change.is_open:
                self.hauler.flip(change)
            if number not in placement.requests:
                return False  # a device was lost on the way
        has_room = not placement.full_devices(number)
        self.num_relieved += has_room
        return has_room

    # --- inside

    @property
    def _placement(self) -> Placement:
        return self.hauler.engine.stages[self.stage].placement

    def _snapshot(self) -> StateSnapshot:
        """The stage as it is; a request may make as many tokens more as room would be kept for if it came now."""
        engine = self.hauler.engine
        snapshot = self._placement.group.snapshot(self._placement.state.snapshot())
        expected = [engine.expected_tokens(int(name)) for name in snapshot.ids]
        return replace(snapshot, remaining_tokens=np.array(expected, np.int64))

    def _solve(
        self, dispatcher: Dispatcher, snapshot: StateSnapshot, *, full: frozenset[int] = frozenset()
    ) -> list[list[Move]]:
        """Moves of the first wave, those that go together by themselves; ``full``: devices that lack a page now."""
        from hetis.solver.redispatch.problem import RedispatchProblem
        from hetis.solver.redispatch.solve import Redispatcher

        self.num_looks += 1
        problem = RedispatchProblem(
            snapshot=snapshot,
            num_layers=self.hauler.engine.stages[self.stage].stage.shape.layers,
            link_byte_s=self._placement.group.links(self.link_byte_s),
            full=full,
        )
        bundles: dict[int, list[Move]] = {}
        for move in Redispatcher(dispatcher).solve(problem).moves:
            if move.wave == 0:
                bundles.setdefault(move.together, []).append(move)
                self.num_moves += 1
        return list(bundles.values())

    def _wanted(self, bundle: list[Move]) -> list[WantedMove]:
        """Which heads, and from which rank to which: the solver counts them, the engine names them."""
        group = self._placement.group
        after: dict[int, list[int]] = {}
        wanted = []
        for move in bundle:
            request = int(move.request)
            owners = self._placement.heads(request)
            then = after.setdefault(request, list(owners))
            for split in group.split(
                owners, group.leaving(owners, then, move.source, move.target, move.groups), move.target
            ):
                wanted.append(WantedMove(request, split.heads, split.target, move.together, self.stage))
                for head in split.heads:
                    then[head] = split.target
        return wanted
