"""Which alarms of the sums are worth reading a head map for: none that was in vain before and is the same now."""

from __future__ import annotations

from typing import NamedTuple

from hetis.planner.fleet.redispatching.sums import StageSums
from hetis.solver.redispatch.triggers import Trigger, TriggerKind
from hetis.solver.redispatch.watch import ALWAYS, CHANGE, MOST_CHANGE


class _Vain(NamedTuple):
    """A stage as of the last look in vain."""

    sums: StageSums
    num_finished: int
    values: dict[tuple[TriggerKind, str | None], float]


class AlarmBackoff:
    """`hetis.solver.redispatch.watch.Watch` on sums.

    After a look that moved nothing an alarm counts again when it is new, when its value has grown by the share
    ``CHANGE``, when a device's status changed, when that share of the KV came, went or moved, or when so many requests
    have finished that the KV is replaced by that share. After every further look in vain the share doubles, up to
    ``MOST_CHANGE``; a look that moves something resets it.
    """

    def __init__(self) -> None:
        self._vain: _Vain | None = None
        self._change = CHANGE

    def due(self, sums: StageSums, alarms: tuple[Trigger, ...], *, num_running: int, num_finished: int) -> bool:
        """Return whether any of the alarms is worth a look."""
        vain = self._vain
        if not alarms or vain is None or vain.sums.status != sums.status:
            return bool(alarms)
        # A replica that finishes fewer requests than before has a new engine.
        replaced = num_finished < vain.num_finished or (
            num_finished - vain.num_finished >= self._change * max(1, num_running)
        )
        moved = sum(abs(now - then) for now, then in zip(sums.kv_bytes, vain.sums.kv_bytes, strict=True))
        if replaced or moved > self._change * (sum(sums.kv_bytes) + sum(vain.sums.kv_bytes)):
            return True
        return any(alarm.kind in ALWAYS or self._is_news(vain, alarm) for alarm in alarms)

    def looked(self, sums: StageSums, alarms: tuple[Trigger, ...], *, num_finished: int, moved: bool) -> None:
        """A look, for these alarms, has moved something or not."""
        if moved:
            self._vain, self._change = None, CHANGE
            return
        values = {(alarm.kind, alarm.device): alarm.value for alarm in alarms}
        if self._vain is not None and self._vain.sums.status == sums.status:
            self._change = min(MOST_CHANGE, 2 * self._change)
            values = self._vain.values | values
        self._vain = _Vain(sums, num_finished, values)

    def _is_news(self, vain: _Vain, alarm: Trigger) -> bool:
        before = vain.values.get((alarm.kind, alarm.device))
        return before is None or alarm.value > before * (1 + self._change)
