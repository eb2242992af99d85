"""A filter of triggers: those that a search has failed to answer stay quiet until the stage has changed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.snapshot import DeviceStatus, StateSnapshot
from hetis.solver.errors import InvalidProblemError
from hetis.solver.redispatch.triggers import Trigger, TriggerKind

CHANGE = 0.2
MOST_CHANGE = 0.8
ALWAYS = frozenset({TriggerKind.LOST, TriggerKind.CHANGED})  # events, which end once the state is marked as seen


class _Seen(NamedTuple):
    """A stage at the time of the last fruitless look."""

    tokens: dict[str, tuple[int, ...]]  # request: groups times context on every device
    devices: tuple[tuple[str, int, DeviceStatus], ...]
    values: dict[tuple[TriggerKind, str | None], float]


class Watch:
    """A record of looks that moved nothing.

    After such a look a trigger is due again if it is new, if its value has grown by the ratio ``change``, if a device
    has changed, or if that share of the stage's KV came, went, grew or moved. After every further fruitless look the
    share doubles, up to ``MOST_CHANGE``, most of the KV. A look that moves something resets it. Under steady load,
    fruitless looks are therefore about as frequent as the KV is replaced, and a real change is seen at once.
    """

    def __init__(self, *, change: float = CHANGE) -> None:
        if not 0 < change <= MOST_CHANGE:
            raise InvalidProblemError(f"change is {change}, must be > 0 and <= {MOST_CHANGE}")
        self._least = self._change = change
        self._seen: _Seen | None = None

    def due(self, snapshot: StateSnapshot, fired: tuple[Trigger, ...]) -> tuple[Trigger, ...]:
        """Return the fired triggers that are worth a look."""
        seen = self._seen
        if seen is None or _devices(snapshot) != seen.devices or self._has_changed(seen, snapshot):
            return fired
        return tuple(trigger for trigger in fired if trigger.kind in ALWAYS or self._is_news(seen, trigger))

    def looked(self, snapshot: StateSnapshot, fired: tuple[Trigger, ...], *, moved: bool) -> None:
        """Record whether a look at this stage, for all triggers that fired, has moved something."""
        if moved:
            self._seen, self._change = None, self._least
            return
        values = {(trigger.kind, trigger.device): trigger.value for trigger in fired}
        if self._seen is not None and self._seen.devices == _devices(snapshot):
            self._change = min(MOST_CHANGE, 2 * self._change)
            values = self._seen.values | values  # what comes and goes is not new
        else:
            self._change = self._least
        self._seen = _Seen(_tokens(snapshot), _devices(snapshot), values)

    def _is_news(self, seen: _Seen, trigger: Trigger) -> bool:
        before = seen.values.get((trigger.kind, trigger.device))
        return before is None or trigger.value > before * (1 + self._change)

    def _has_changed(self, seen: _Seen, snapshot: StateSnapshot) -> bool:
        tokens, nothing = _tokens(snapshot), (0,) * len(seen.devices)
        names = tokens.keys() | seen.tokens.keys()
        change = sum(
            abs(now - before)
            for name in names
            for now, before in zip(tokens.get(name, nothing), seen.tokens.get(name, nothing), strict=True)
        )
        # KV that leaves one device for another, or is replaced by KV of its size, is counted twice.
        both = sum(map(sum, tokens.values())) + sum(map(sum, seen.tokens.values()))
        return change > self._change * both


def _tokens(snapshot: StateSnapshot) -> dict[str, tuple[int, ...]]:
    rows = snapshot.groups * np.asarray(snapshot.context_tokens)[:, None]
    return {name: tuple(row) for name, row in zip(snapshot.ids, rows.tolist(), strict=True)}


def _devices(snapshot: StateSnapshot) -> tuple[tuple[str, int, DeviceStatus], ...]:
    return tuple((device.name, device.total_blocks, device.status) for device in snapshot.devices)
