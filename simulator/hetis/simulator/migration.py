"""Re-dispatch of one stage copy: its checks and moves by `hetis.solver.redispatch`, as copies in the background.

One check covers one micro-batch, for which the stage's time is that of its slowest device. Copies of a wave start
together, but wait for one another, and for KV from prefill replicas, if they need the same device's link (`links.py`).
The next wave starts when all of them are committed. They do not delay the exchange with the primary.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from hetis.simulator.events import Events
from hetis.simulator.links import FleetLinks, transfer
from hetis.simulator.pool_load import Decoding
from hetis.simulator.pool_timing import PoolTiming
from hetis.simulator.request_log import RequestLog
from hetis.solver.dispatch.snapshot import DeviceSnapshot, DeviceStatus, PreparedMove, StateSnapshot
from hetis.solver.dispatch.state import DispatchState

if TYPE_CHECKING:
    from hetis.solver.redispatch.problem import Move
    from hetis.solver.redispatch.triggers import Watch

Moved = Callable[[int], None]


class Migration:
    """Moves of one stage copy, one plan at a time."""

    def __init__(
        self, state: DispatchState, timing: PoolTiming, links: FleetLinks, log: RequestLog, events: Events, *,
        theta: float, mean_output: float,
    ) -> None:  # fmt: skip
        from hetis.solver.dispatch.solve import Dispatcher
        from hetis.solver.redispatch.solve import Redispatcher

        self._state, self._timing, self._links, self._log, self._events = state, timing, links, log, events
        self._theta = theta
        self._remaining = max(1, round(mean_output))  # of any request: the actual output is not known
        self._dispatcher = Dispatcher(state.stage)
        self._redispatcher = Redispatcher(self._dispatcher)
        self._devices = state.stage.devices
        self._link_byte_s = timing.move_byte_s(len(self._devices))
        self._watches: dict[int, Watch] = {}  # by micro-batch
        self._waves: list[list[Move]] = []
        self._pending = 0  # bundles of the present wave that are not committed

    @property
    def is_under_way(self) -> bool:
        return self._pending > 0

    def look(self, now_s: float, batch: Decoding, moved: Moved) -> None:
        """Start the moves that benefit a micro-batch, if it deviates by more than Theta or memory is short.

        ``moved`` is called with every request whose home has changed.
        """
        from hetis.solver.redispatch.problem import RedispatchProblem
        from hetis.solver.redispatch.triggers import Watch, triggers

        snapshot = self._snapshot(batch)
        fired = triggers(snapshot, self._dispatcher, theta=self._theta)
        watch = self._watches.setdefault(batch.index, Watch())
        if not watch.due(snapshot, fired):
            return
        problem = RedispatchProblem(
            snapshot=snapshot, num_layers=self._timing.layers, link_byte_s=self._link_byte_s
        )  # fmt: skip
        moves = self._redispatcher.solve(problem).moves
        watch.looked(snapshot, fired, moved=bool(moves))
        self._state.mark_seen()
        self._waves = [list(wave) for _, wave in groupby(moves, key=lambda move: move.wave)]
        self._next_wave(now_s, moved)

    def _snapshot(self, batch: Decoding) -> StateSnapshot:
        """Return the decoding requests of the micro-batch, on devices with only their blocks and the free ones."""
        state = self._state
        ids = [str(request) for request in batch.decoding]
        context = np.array([state.context_tokens(name) for name in ids], np.int64)
        groups = np.stack([state.groups(name) for name in ids])
        used = -(-context // state.stage.heads.block_tokens) @ groups
        total = used + np.maximum(0, state.free_blocks())
        return StateSnapshot(
            stage=state.stage,
            devices=tuple(map(_as_seen, state.devices, used.tolist(), total.tolist())),
            ids=tuple(ids),
            context_tokens=context,
            remaining_tokens=np.full(len(ids), self._remaining, np.int64),
            groups=groups,
        )

    def _next_wave(self, now_s: float, moved: Moved) -> None:
        """Start the moves that are still possible in the next wave that has any."""
        while self._waves and not self._pending:
            bundles: dict[int, list[Move]] = {}
            for move in self._waves.pop(0):
                bundles.setdefault(move.together, []).append(move)
            for bundle in bundles.values():
                prepared = self._prepared(bundle)
                if prepared:
                    self._pending += 1
                    end_s = max(
                        self._copy(now_s, one, move.num_bytes) for one, move in zip(prepared, bundle, strict=True)
                    )
                    num_bytes = sum(move.num_bytes for move in bundle)
                    self._events.at(end_s, self._commit, prepared, num_bytes, moved)

    def _prepared(self, bundle: list[Move]) -> list[PreparedMove]:
        """Take blocks for moves that are committed together; none if one of them is no longer possible."""
        state, prepared = self._state, list[PreparedMove]()
        for move in bundle:
            holds = move.request in state and state.groups(move.request)[move.source] >= move.groups
            one = None
            if holds and state.devices[move.target].status is DeviceStatus.OK:
                one = state.prepare_move(move.request, groups=move.groups, source=move.source, target=move.target)
            if one is None:
                for other in prepared:
                    state.abort_move(other.number)
                return []
            prepared.append(one)
        return prepared

    def _copy(self, now_s: float, move: PreparedMove, num_bytes: float) -> float:
        seconds = num_bytes * max(self._link_byte_s[move.source], self._link_byte_s[move.target])
        source, target = self._devices[move.source], self._devices[move.target]
        return transfer(now_s, float(seconds), self._links.leaving(source), self._links.coming(target))

    def _commit(self, now_s: float, prepared: list[PreparedMove], num_bytes: float, moved: Moved) -> None:
        self._pending -= 1
        under_way = {move.number for move in self._state.moves}
        numbers = [move.number for move in prepared]
        if under_way.issuperset(numbers):  # otherwise its request is done, evicted or has lost a device
            self._state.commit_moves(*numbers)
            request = int(prepared[0].request)
            self._log.migrations += len(prepared)
            self._log.migrated_bytes += num_bytes
            self._log.moved_bytes[request] += num_bytes
            moved(request)
        else:
            for number in under_way.intersection(numbers):
                self._state.abort_move(number)
        self._next_wave(now_s, moved)


def _as_seen(device: DeviceSnapshot, used: int, total: int) -> DeviceSnapshot:
    """Return a device with ``total`` blocks, whose high-water mark leaves as many of them free as before."""
    kept_free = (1.0 - device.high_water) * device.total_blocks
    mark = 1.0 if used + kept_free <= 0 else min(1.0, max(1e-9, used / (used + kept_free)))
    return DeviceSnapshot(
        name=device.name, total_blocks=total, status=device.status, high_water=mark, changed=device.changed
    )  # fmt: skip
