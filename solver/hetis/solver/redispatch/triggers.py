"""Triggers of re-dispatch: the makespan has drifted from the ideal, memory fills up, or devices have changed.

The ideal is all running requests dispatched again, as if moves were free. A `Watch` filters triggers: those that a
search could not resolve stay quiet until the stage has changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.dispatch_problem import DeviceLoad, DispatchPlan, Requests
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.loaded_stage import costs_of, running_load
from hetis.solver.dispatch.snapshot import DeviceStatus, StateSnapshot
from hetis.solver.errors import InvalidProblemError


def ideal_dispatch(snapshot: StateSnapshot, dispatcher: Dispatcher, *, on_draining: bool = False) -> DispatchPlan:
    """Dispatch all running requests anew to idle devices, which shows the stage without its history.

    With ``on_draining``, devices to be emptied may be used, so that the bound holds while they are still in use.
    """
    usable = {DeviceStatus.OK, DeviceStatus.DRAINING} if on_draining else {DeviceStatus.OK}
    free = [device.total_blocks if device.status in usable else 0 for device in snapshot.devices]
    everything = Requests(
        ids=snapshot.ids, context_tokens=snapshot.context_tokens, growth_tokens=np.zeros(len(snapshot.ids), np.int64)
    )
    return dispatcher.dispatch(DeviceLoad.idle(np.array(free, np.int64)), everything, tolerance=0.01)


THETA = 0.5  # Hetis (SC'25)
CHANGE = 0.2
MOST_CHANGE = 0.8


class TriggerKind(StrEnum):
    """The event behind a trigger.

    ``deviation``: the makespan is above the ideal by more than Theta. ``high_water``: a device uses more of its KV
    blocks than its mark. ``draining``: a device is to be emptied. ``lost``, ``changed``: a device was lost, or joined,
    came back or changed its speed, since the last check by re-dispatch (`DispatchState.mark_seen`).
    """

    DEVIATION = "deviation"
    HIGH_WATER = "high_water"
    DRAINING = "draining"
    LOST = "lost"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """A reason to check whether re-dispatch helps, with its numbers."""

    kind: TriggerKind
    device: str | None  # name of the device; None for ``deviation``, which concerns the stage
    # Excess of the makespan over the ideal as a ratio to it; share of blocks in use; head groups still on a draining
    # device; 0 for the other kinds.
    value: float
    limit: float

    def __str__(self) -> str:
        match self.kind:
            case TriggerKind.DEVIATION:
                return f"the makespan is {self.value:.0%} above the ideal, more than {self.limit:.0%}"
            case TriggerKind.HIGH_WATER:
                return f"{self.device} uses {self.value:.0%} of its KV blocks, more than {self.limit:.0%}"
            case TriggerKind.DRAINING:
                return f"{self.device} is draining and holds {self.value:.0f} head groups"
            case TriggerKind.LOST:
                return f"{self.device} was lost"
            case TriggerKind.CHANGED:
                return f"{self.device} joined, came back or changed its speed"


def triggers(snapshot: StateSnapshot, dispatcher: Dispatcher, *, theta: float = THETA) -> tuple[Trigger, ...]:
    """Return every reason to re-dispatch, none for an empty stage; ``dispatcher`` must be of the same stage.

    A trigger fires as long as its reason holds, even if no search can do anything about it. `Watch` determines which
    triggers are worth another check.
    """
    if theta < 0:
        raise InvalidProblemError(f"theta is {theta}, must be >= 0")
    found = list[Trigger]()
    used, held = snapshot.used_blocks(), snapshot.groups.sum(axis=0)
    if not len(snapshot.ids):
        return ()
    ideal = ideal_dispatch(snapshot, dispatcher)
    if ideal.unplaced:  # devices to be emptied are still required
        ideal = ideal_dispatch(snapshot, dispatcher, on_draining=True)
    deviation = makespan_s(snapshot) / max(ideal.bound_s, 1e-12) - 1.0
    # If memory is too scattered to dispatch all requests again, the ideal covers fewer of them and means nothing.
    if deviation > theta and not ideal.unplaced:
        found.append(Trigger(kind=TriggerKind.DEVIATION, device=None, value=deviation, limit=theta))
    for i, device in enumerate(snapshot.devices):
        share = float(used[i] / max(1, device.total_blocks))
        if device.status is DeviceStatus.OK and share > device.high_water:
            found.append(Trigger(kind=TriggerKind.HIGH_WATER, device=device.name, value=share, limit=device.high_water))
        if device.status is DeviceStatus.DRAINING and held[i]:
            found.append(Trigger(kind=TriggerKind.DRAINING, device=device.name, value=float(held[i]), limit=0.0))
        if device.changed and device.status is not DeviceStatus.DRAINING:
            kind = TriggerKind.LOST if device.status is DeviceStatus.LOST else TriggerKind.CHANGED
            found.append(Trigger(kind=kind, device=device.name, value=0.0, limit=0.0))
    return tuple(found)


def makespan_s(snapshot: StateSnapshot) -> float:
    """Return the seconds per layer and decode step of the slowest device, or of the primary's network card."""
    load = snapshot.load()
    return running_load(costs_of(snapshot.stage), load.heads, load.kv_bytes).floor_s


ALWAYS = frozenset({TriggerKind.LOST, TriggerKind.CHANGED})  # events, which end once the state is marked as seen


class _Seen(NamedTuple):
    """A stage at the time of the last fruitless check."""

    tokens: dict[str, tuple[int, ...]]  # groups times context on every device, by request
    devices: tuple[tuple[str, int, DeviceStatus], ...]
    values: dict[tuple[TriggerKind, str | None], float]


class Watch:
    """A record of checks that moved nothing.

    After such a check a trigger is due again if it is new, if its value has grown by the ratio ``change``, if a device
    has changed, or if that share of the stage's KV came, went, grew or moved. After every further fruitless check the
    share doubles, up to ``MOST_CHANGE``, most of the KV. A check that moves something resets it. Under steady load,
    fruitless checks are therefore about as frequent as the KV is replaced, and a real change is noticed at once.
    """

    def __init__(self, *, change: float = CHANGE) -> None:
        if not 0 < change <= MOST_CHANGE:
            raise InvalidProblemError(f"change is {change}, must be > 0 and <= {MOST_CHANGE}")
        self._least = self._change = change
        self._seen: _Seen | None = None

    def due(self, snapshot: StateSnapshot, fired: tuple[Trigger, ...]) -> tuple[Trigger, ...]:
        """Return the fired triggers that are worth a check."""
        seen = self._seen
        if seen is None or _devices(snapshot) != seen.devices or self._has_changed(seen, snapshot):
            return fired
        return tuple(trigger for trigger in fired if trigger.kind in ALWAYS or self._is_news(seen, trigger))

    def looked(self, snapshot: StateSnapshot, fired: tuple[Trigger, ...], *, moved: bool) -> None:
        """Record whether a check of this stage, for all triggers that fired, has moved something."""
        if moved:
            self._seen, self._change = None, self._least
            return
        values = {(trigger.kind, trigger.device): trigger.value for trigger in fired}
        if self._seen is not None and self._seen.devices == _devices(snapshot):
            self._change = min(MOST_CHANGE, 2 * self._change)
            values = self._seen.values | values  # triggers that come and go are not new
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
        # KV that leaves one device for another, or is replaced by as much KV, is counted twice.
        both = sum(map(sum, tokens.values())) + sum(map(sum, seen.tokens.values()))
        return change > self._change * both


def _tokens(snapshot: StateSnapshot) -> dict[str, tuple[int, ...]]:
    rows = snapshot.groups * np.asarray(snapshot.context_tokens)[:, None]
    return {name: tuple(row) for name, row in zip(snapshot.ids, rows.tolist(), strict=True)}


def _devices(snapshot: StateSnapshot) -> tuple[tuple[str, int, DeviceStatus], ...]:
    return tuple((device.name, device.total_blocks, device.status) for device in snapshot.devices)
