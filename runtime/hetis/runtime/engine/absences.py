"""Devices that take no heads for now: lost, or drained. They may come back, and are expected for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hetis.runtime.engine.heads import StageHeads

Devices = Mapping[int, frozenset[int]]


class Absences:
    """Since when devices of the stages are away; as of the last `look`.

    A device that is away for ``patience_s`` is *gone*: nobody waits for it any more. When it comes back it is as
    welcome as before.

    Attributes:
        away: devices that take no heads, by the number of their stage.
        gone: of them, those that are not expected back.
    """

    def __init__(self, stages: Sequence[StageHeads], *, patience_s: float, clock: Callable[[], float]) -> None:
        self._stages, self._patience_s, self._clock = stages, patience_s, clock
        self._since_s: dict[tuple[int, int], float] = {}
        self.away: Devices = {}
        self.gone: Devices = {}

    def look(self) -> None:
        """Finds out who is away, between two steps."""
        now_s = self._clock()
        found = [(part.number, device) for part in self._stages for device in part.placement.away()]
        self._since_s = {key: self._since_s.get(key, now_s) for key in found}
        self.away = _by_stage(found)
        self.gone = _by_stage([key for key in found if now_s - self._since_s[key] >= self._patience_s])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the devices that are away."""
        return tuple(self._stages[number].stage.devices[device].name for number, device in self._since_s)

    def why(self) -> str:
        """What a request is told that cannot be served without them."""
        names, verb = self.names, "is" if len(self.names) == 1 else "are"
        return f"{', '.join(names)} {verb} away: the devices that are left have too few KV pages"


def _by_stage(devices: Sequence[tuple[int, int]]) -> Devices:
    return {number: frozenset(d for n, d in devices if n == number) for number, _ in devices}
