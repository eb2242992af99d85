"""Re-dispatch in vLLM's scheduler: periodically the solver examines the running requests, and makes the moves that pay.

A look costs milliseconds of the scheduler's process, so it is only taken if triggers fire: the slowest device is far
above the ideal, or a device is above its high-water mark, draining, or has come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hetis.solver.dispatch.problem import FloatArray
from hetis.solver.dispatch.solve import Dispatcher
from hetis.solver.redispatch.problem import RedispatchProblem
from hetis.solver.redispatch.solve import Redispatcher
from hetis.solver.redispatch.triggers import triggers
from hetis.solver.redispatch.watch import Watch

if TYPE_CHECKING:
    from hetis.runtime.vllm.allocator import HeadAllocator
    from hetis.runtime.vllm.settings import EngineRedispatchSettings

BeginMove = Callable[[str, Sequence[int], int], int | None]


class Redispatch:
    """Examines one engine's requests at a fixed interval of steps.

    Attributes:
        num_looks: number of times that the solver was called.
    """

    def __init__(
        self,
        allocator: HeadAllocator,
        begin_move: BeginMove,
        settings: EngineRedispatchSettings,
        *,
        num_layers: int,
        link_byte_s: Callable[[], FloatArray],
    ) -> None:
        """Initialise with the model's ``num_layers`` and the seconds per byte of KV leaving each device, shape [D]."""
        self._allocator, self._begin_move, self._settings = allocator, begin_move, settings
        self._num_layers, self._link_byte_s, self._steps = num_layers, link_byte_s, 0
        self._watch = Watch()
        self.num_looks = 0

    def advance(self) -> None:
        """Count a step, and look if it is time."""
        self._steps += 1
        due = self._steps % self._settings.every_steps == 0
        if self._settings.enabled and due and self._allocator.running and not self._allocator.moves:
            self.look()

    def look(self) -> None:
        """Begin the moves of the first wave if triggers fire and any moves pay. Later waves come with later looks."""
        allocator = self._allocator
        snapshot = allocator.snapshot()
        dispatcher = Dispatcher(snapshot.stage)
        fired = triggers(snapshot, dispatcher, theta=self._settings.theta)
        if not self._watch.due(snapshot, fired):
            return
        self.num_looks += 1
        problem = RedispatchProblem(snapshot=snapshot, num_layers=self._num_layers, link_byte_s=self._link_byte_s())
        moves = [move for move in Redispatcher(dispatcher).solve(problem).moves if move.wave == 0]
        self._watch.looked(snapshot, fired, moved=bool(moves))
        allocator.state.mark_seen()
        for move in moves:
            owners = allocator.devices(move.request)
            groups = [group for group, device in enumerate(owners) if device == move.source][: move.groups]
            self._begin_move(move.request, groups, move.target)
