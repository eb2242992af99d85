"""vLLM's own re-dispatch, while no planner steers the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hetis.runtime.vllm.allocator import HeadAllocator
from hetis.solver.dispatch.dispatch_problem import FloatArray
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.redispatch.redispatch_problem import Move, MoveReason, RedispatchProblem
from hetis.solver.redispatch.redispatcher import Redispatcher
from hetis.solver.redispatch.triggers import Watch, triggers

if TYPE_CHECKING:
    from hetis.runtime.vllm.settings import EngineRedispatchSettings

CALM_STEPS = 8192
REST_STEPS = 16  # the shortest rest of two devices after a return, before it is doubled
MOST_RETURNS = 8


class Redispatch:
    """Examines one engine's requests at a fixed interval of steps, and makes the moves that pay.

    A look costs the scheduler's process milliseconds, so it is only taken if a trigger fires: the slowest device is far
    above the ideal, or a device is above its high-water mark, draining, or has come back.
    """

    def __init__(
        self,
        allocator: HeadAllocator,
        begin_move: Callable[[str, Sequence[int], int], int | None],
        settings: EngineRedispatchSettings,
        *,
        num_layers: int,
        link_byte_s: Callable[[], FloatArray],
    ) -> None:
        """Initialise with the model's ``num_layers`` and the seconds per byte of KV leaving each device, shape [D]."""
        self._allocator, self._begin_move, self._settings = allocator, begin_move, settings
        self._num_layers, self._link_byte_s, self._steps = num_layers, link_byte_s, 0
        self._watch = Watch()
        # By request: the step from which on it may move for balance again, and how often it has done so
        self._rests: dict[str, tuple[float, int]] = {}
        self._returns = Returns()

    def advance(self) -> None:
        """Count a step. If it is time, begin the moves of the first wave; later waves come with later looks."""
        self._steps += 1
        allocator = self._allocator
        if allocator.state.stage.num_devices == 1:
            return  # there is nowhere to go
        self._returns.forget(self._steps)
        due = self._settings.enabled and self._steps % self._settings.every_steps == 0
        if not due or not allocator.running or allocator.moves:
            return
        snapshot = allocator.snapshot()
        dispatcher = Dispatcher(snapshot.stage)
        fired = triggers(snapshot, dispatcher, theta=self._settings.theta)
        if not self._watch.due(snapshot, fired):
            return
        problem = RedispatchProblem(snapshot=snapshot, num_layers=self._num_layers, link_byte_s=self._link_byte_s())
        running = set(allocator.running)
        self._rests = {name: rest for name, rest in self._rests.items() if name in running}
        plan = Redispatcher(dispatcher).solve(problem)
        first = [move for move in plan.moves if move.wave == 0]
        allow, step = self._returns.allow, self._steps
        moves = [move for move in first if not self._rests_still(move) and allow(move, step)]
        self._watch.looked(snapshot, fired, moved=bool(moves))
        allocator.state.mark_seen()
        for move in moves:
            owners = allocator.devices(move.request)
            groups = [group for group, device in enumerate(owners) if device == move.source][: move.groups]
            if self._begin_move(move.request, groups, move.target) is not None and move.payback_steps is not None:
                _, times = self._rests.get(move.request, (0.0, 0))
                self._rests[move.request] = self._steps + move.payback_steps * 2**times, times + 1
                self._returns.began(move, self._steps)

    def _rests_still(self, move: Move) -> bool:
        """Return whether a move for balance has to wait until an earlier one of its request has paid back its cost.

        Measured costs waver, and depend on where the heads are. Each such move of a request doubles its next wait, so
        that its heads come to rest.
        """
        return move.reason is MoveReason.BALANCE and self._steps < self._rests.get(move.request, (0.0, 0))[0]


class Returns:
    """Moves for balance that were taken back: a sign that costs were not what they had seemed before the move.

    Then no such move is made between the two devices, of later requests either, until a rest is over: as long as the
    move takes to pay back what it costs, and `REST_STEPS` at least, doubled for every return of late.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}  # the last source and target, by request
        self._counts: dict[frozenset[int], int] = {}  # returns, by pair of devices
        self._rests: dict[frozenset[int], float] = {}  # the step at which a pair's rest is over
        self._since = 0  # the step at which returns were last counted, or forgotten

    def allow(self, move: Move, step: int) -> bool:
        """Return whether a move may begin."""
        return move.reason is not MoveReason.BALANCE or step >= self._rests.get(_pair(move), 0)

    def began(self, move: Move, step: int) -> None:
        """Count a move for balance that has begun."""
        if move.payback_steps is not None and self._last.get(move.request) == (move.target, move.source):
            pair = _pair(move)
            count = self._counts[pair] = min(self._counts.get(pair, 0) + 1, MOST_RETURNS)
            self._since, self._rests[pair] = step, step + max(move.payback_steps, REST_STEPS) * 2**count
        self._last[move.request] = move.source, move.target

    def forget(self, step: int) -> None:
        """Forget a return of every pair after `CALM_STEPS` without one."""
        if step - self._since >= CALM_STEPS:
            self._since = step
            self._counts = {pair: count - 1 for pair, count in self._counts.items() if count > 1}
            self._last.clear()


def _pair(move: Move) -> frozenset[int]:
    return frozenset((move.source, move.target))
