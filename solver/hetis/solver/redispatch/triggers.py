"""Triggers of re-dispatch: the makespan drifted from the ideal, memory fills, or devices changed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hetis.solver.dispatch.snapshot import DeviceStatus, StateSnapshot
from hetis.solver.dispatch.solve import Dispatcher
from hetis.solver.dispatch.tables import costs_of, running_load
from hetis.solver.errors import InvalidProblemError
from hetis.solver.redispatch.ideal import ideal_dispatch

THETA = 0.5  # Hetis (SC'25)


class TriggerKind(StrEnum):
    """The event behind a trigger.

    ``deviation``: the makespan is above the ideal by more than Theta. ``high_water``: a device uses more of its KV
    blocks than its mark. ``draining``: a device is to be emptied. ``lost``, ``changed``: a device was lost, or joined,
    came back or changed its speed, since the last look of re-dispatch (`DispatchState.mark_seen`).
    """

    DEVIATION = "deviation"
    HIGH_WATER = "high_water"
    DRAINING = "draining"
    LOST = "lost"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """A reason to look, with its numbers.

    Attributes:
        kind: what happened.
        device: its name; None for ``deviation``, which concerns the stage.
        value: excess of the makespan over the ideal as a ratio to it; share of blocks in use; head groups still on a
            draining device; 0 for the others.
        limit: the limit that ``value`` exceeds.
    """

    kind: TriggerKind
    device: str | None
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
    """Return every reason to re-dispatch, none for an empty stage; ``dispatcher`` is of the same stage.

    A trigger fires as long as its reason holds, even if no search can do anything about it.
    `hetis.solver.redispatch.watch.Watch` tells which are worth another look.
    """
    if theta < 0:
        raise InvalidProblemError(f"theta is {theta}, must be >= 0")
    found = list[Trigger]()
    used, held = snapshot.used_blocks(), snapshot.groups.sum(axis=0)
    if not len(snapshot.ids):
        return ()
    ideal = ideal_dispatch(snapshot, dispatcher)
    if ideal.unplaced:  # devices to be emptied are still needed
        ideal = ideal_dispatch(snapshot, dispatcher, on_draining=True)
    deviation = makespan_s(snapshot) / max(ideal.bound_s, 1e-12) - 1.0
    # If memory is too scattered to dispatch all again, the ideal is of fewer requests and says nothing.
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
