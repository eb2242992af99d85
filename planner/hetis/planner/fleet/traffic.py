"""Windows of a cluster's measured traffic: minutes and hours by model, from the cumulative readings of its replicas.

A minute is complete, and never changes again, `SETTLE_S` after its end, when all agents have reported; an hour is the
sum of its minutes. What a replica counted between two readings is spread evenly over the time between them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from hetis.planner.convert.traffic import HOUR_S, MINUTE_S, TrafficWindow
from hetis.solver.plan import Role
from hetis.solver.traffic import SCALES, TrafficSketch

KEPT_S = {MINUTE_S: 6 * HOUR_S, HOUR_S: 15 * 24 * HOUR_S}
SETTLE_S = 10.0
SILENCE_S = 90.0  # after so long without any reading nothing was observed in between
_OF_PREFILL, _OF_DECODE = ("output_tokens", "tpot_s"), ("prompt_tokens", "ttft_s", "wait_s")


def is_kept(window: TrafficWindow, now_s: float) -> bool:
    """Return whether a window is neither too old nor of a time that is still to come, since the clock was set back."""
    return now_s - KEPT_S[window.span_s] < window.start_s <= now_s - window.span_s


def of_role(traffic: TrafficSketch, role: Role) -> TrafficSketch:
    """Return what counts of a replica's requests, which a prefill and a decode replica both count."""
    match role:
        case Role.PREFILL:
            return replace(traffic, **{name: _EMPTY[name] for name in _OF_PREFILL})
        case Role.DECODE:
            rest = {name: _EMPTY[name] for name in _OF_DECODE}
            return replace(traffic, arrivals=0.0, cached_tokens=0.0, **rest)
    return traffic


_EMPTY = {name: getattr(TrafficSketch(), name) for name in SCALES}


@dataclass(slots=True)
class _Observed:
    """The minutes of a model that are not complete. ``since_s`` and ``until_s``: the time that was observed last."""

    since_s: float
    until_s: float
    minutes: dict[int, TrafficSketch]
    total: TrafficSketch = field(default_factory=TrafficSketch)  # since the first reading; `seconds` are a clock

    def window(self, model: str, start_s: int) -> TrafficWindow:
        seconds = min(start_s + MINUTE_S, self.until_s) - max(start_s, self.since_s)
        traffic = replace(self.minutes[start_s], seconds=max(0.0, seconds))
        return TrafficWindow(model=model, span_s=MINUTE_S, start_s=start_s, traffic=traffic)


class TrafficWindows:
    """The windows of one cluster, of which it keeps as many as `KEPT_S` says. Times are Unix times."""

    def __init__(self, complete: Iterable[TrafficWindow] = ()) -> None:
        self._complete = {(one.model, one.span_s, one.start_s): one for one in complete}
        self._observed: dict[str, _Observed] = {}
        self._readings: dict[str, tuple[float, TrafficSketch]] = {}  # with the times at which they came
        self._closed_s = 0  # minutes before this are complete

    def take(self, replica: str, model: str, reading: TrafficSketch, now_s: float) -> TrafficSketch | None:
        """Take a cumulative reading, and return what came since the last one; None if there was none to compare."""
        _, earlier = self._readings.get(replica, (0.0, None))
        self._readings[replica] = now_s, reading
        if earlier is None or (added := reading.since(earlier)).seconds <= 0:
            return None
        begin_s = now_s - added.seconds
        seen = self._observed.get(model)
        if seen is None or begin_s - seen.until_s > SILENCE_S:
            seen = seen or _Observed(since_s=begin_s, until_s=now_s, minutes={})
            self._observed[model], seen.since_s = seen, begin_s
        passed_s = min(max(0.0, now_s - seen.until_s), added.seconds)  # not what the clock was set forward
        if seen.until_s - now_s > SILENCE_S:  # it was set back
            seen.since_s, seen.until_s, self._closed_s = begin_s, now_s, 0
        seen.since_s, seen.until_s = min(seen.since_s, begin_s), max(seen.until_s, now_s)
        seen.total = replace(seen.total.beside(added), seconds=seen.total.seconds + passed_s)
        first = max(int(begin_s // MINUTE_S) * MINUTE_S, self._closed_s, int(now_s) - HOUR_S)
        for start_s in range(first - first % MINUTE_S, int(now_s) + 1, MINUTE_S):
            share = (min(now_s, start_s + MINUTE_S) - max(begin_s, start_s)) / added.seconds
            if share > 0:
                part = added if share >= 1 else added.times(share)
                seen.minutes[start_s] = seen.minutes[start_s].beside(part) if start_s in seen.minutes else part
        return added

    def total(self, model: str) -> TrafficSketch | None:
        """Return what was observed of a model since the planner's start, as a cumulative reading; None: nothing."""
        return self._observed[model].total if model in self._observed else None

    def complete(self, now_s: float) -> list[TrafficWindow]:
        """Complete the windows whose time is over, and return them."""
        self._closed_s = int((now_s - SETTLE_S) // MINUTE_S) * MINUTE_S
        found = list[TrafficWindow]()
        for model, seen in self._observed.items():
            for start_s in sorted(start for start in seen.minutes if start < self._closed_s):
                found.append(seen.window(model, start_s))
                del seen.minutes[start_s]
        self._complete |= {(one.model, one.span_s, one.start_s): one for one in found}
        hours = defaultdict[tuple[str, int], list[TrafficWindow]](list)
        for one in self._complete.values():
            hour_s = one.start_s - one.start_s % HOUR_S
            is_over = hour_s + HOUR_S <= self._closed_s
            if one.span_s == MINUTE_S and is_over and (one.model, HOUR_S, hour_s) not in self._complete:
                hours[one.model, hour_s].append(one)
        for (model, hour_s), minutes in hours.items():
            total = sum((one.traffic for one in minutes[1:]), minutes[0].traffic)
            found.append(TrafficWindow(model=model, span_s=HOUR_S, start_s=hour_s, traffic=total))
            self._complete[model, HOUR_S, hour_s] = found[-1]
        return found

    def drop(self, now_s: float) -> list[TrafficWindow]:
        """Drop what is too old, and return the windows of it."""
        old = [one for one in self._complete.values() if not is_kept(one, now_s)]
        for one in old:
            del self._complete[one.model, one.span_s, one.start_s]
        self._readings = {name: found for name, found in self._readings.items() if found[0] > now_s - HOUR_S}
        return old

    def windows(self, *, least_s: float = 0.0) -> list[TrafficWindow]:
        """Return all windows by time; minutes that are not complete as far as they are, from ``least_s`` on."""
        found = list(self._complete.values())
        for model, seen in self._observed.items():
            found += [
                window for start in seen.minutes if (window := seen.window(model, start)).traffic.seconds > least_s
            ]
        return sorted(found, key=lambda one: (one.start_s, one.span_s, one.model))
