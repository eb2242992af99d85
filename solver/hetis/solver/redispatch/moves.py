"""The way from one placement to another: moves from device to device, the worth of each, and an order of them.

In that order each step has room at its targets while its sources still hold the blocks. Steps go in waves: those of one
wave fit together, and the blocks they free are for the next. A step of one part is split if only some of its groups
fit. If nothing fits, the remaining steps wait for each other in a cycle. One of them then takes a detour through a
third device with room and reaches its target later; a step that finds no detour is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.dispatch_problem import FloatArray, IntArray
from hetis.solver.redispatch.move_search import placement_of, seconds_with, short_with
from hetis.solver.redispatch.redispatch_tables import RedispatchTables, card_s, kernel


class MovedGroups(NamedTuple):
    """Head groups that move from one device to another, given by indices."""

    groups: int
    source: int
    target: int


class RequestMoves(NamedTuple):
    """Moves of request ``j`` that are committed together.

    There is more than one part only if the primary, which takes several groups at once, receives them from several
    devices or gives them to several.
    """

    j: int
    parts: tuple[MovedGroups, ...]

    @property
    def groups(self) -> int:
        return sum(part.groups for part in self.parts)

    def part_of(self, groups: int) -> RequestMoves:
        """Return a step of one part reduced to ``groups``."""
        return RequestMoves(self.j, (self.parts[0]._replace(groups=groups),))


class Worth(NamedTuple):
    """The loss of a set of steps without one of them: seconds of makespan, and the price of short blocks."""

    saved_s: float
    relieved_s: float


def steps_between(tables: RedispatchTables, before: IntArray, after: IntArray) -> list[RequestMoves]:
    """Return steps that lead from ``before`` to ``after`` [N, D]."""
    found = list[RequestMoves]()
    for j in np.flatnonzero((before != after).any(axis=1)).tolist():
        change = (after[j] - before[j]).tolist()
        if tables.primary >= 0 and change[tables.primary]:
            found += _steps_of_primary(j, change, tables.primary, int(tables.unit[tables.primary]))
        gains = [(i, n) for i, n in enumerate(change) if n > 0]
        loses = [(i, -n) for i, n in enumerate(change) if n < 0]
        found += [RequestMoves(j, (MovedGroups(n, source, target),)) for n, source, target in _pairs(loses, gains)]
    return found


def _steps_of_primary(j: int, change: list[int], primary: int, unit: int) -> list[RequestMoves]:
    """Return steps to or from the primary, whole multiples per device, then the rest together; empties ``change``."""
    arrives = change[primary] > 0
    sign = -1 if arrives else 1
    left = abs(change[primary])
    partners = sorted(
        (i for i in range(len(change)) if sign * change[i] > 0 and i != primary), key=lambda i: (-sign * change[i], i)
    )
    steps, rest = list[RequestMoves](), list[MovedGroups]()

    def part(i: int, groups: int) -> MovedGroups:
        change[i] -= sign * groups
        return MovedGroups(groups, i, primary) if arrives else MovedGroups(groups, primary, i)

    for i in partners:
        n = min(left, sign * change[i]) // unit * unit
        if n:
            steps.append(RequestMoves(j, (part(i, n),)))
            left -= n
    for i in partners:
        while left and change[i]:
            n = min(unit - sum(p.groups for p in rest), sign * change[i])
            rest.append(part(i, n))
            if sum(p.groups for p in rest) == unit:
                steps.append(RequestMoves(j, tuple(rest)))
                left, rest = left - unit, []
    change[primary] = 0
    return steps


def _pairs(loses: list[tuple[int, int]], gains: list[tuple[int, int]]) -> Iterable[tuple[int, int, int]]:
    """Yield (groups, source, target) until all groups lost are gained elsewhere."""
    left = dict(loses)
    for target, wanted in sorted(gains, key=lambda gain: (-gain[1], gain[0])):
        for source in sorted(left, key=lambda i: (-left[i], i)):
            n = min(wanted, left[source])
            if n:
                yield n, source, target
                left[source] -= n
                wanted -= n


def applied(x: IntArray, steps: Iterable[RequestMoves]) -> IntArray:
    """Return the groups [N, D] after all steps."""
    result = x.copy()
    for step in steps:
        for groups, source, target in step.parts:
            result[step.j, source] -= groups
            result[step.j, target] += groups
    return result


def part_seconds(tables: RedispatchTables, j: int, part: MovedGroups) -> float:
    """Return the seconds of the copy on the slower of its two links."""
    byte_s = max(tables.link_byte_s[part.source], tables.link_byte_s[part.target])
    return part.groups * float(tables.num_bytes[j]) * float(byte_s)


def step_seconds(tables: RedispatchTables, step: RequestMoves) -> float:
    """Return the seconds of copying all parts one after another."""
    return sum(part_seconds(tables, step.j, part) for part in step.parts)


def per_decode_step_s(tables: RedispatchTables, step: RequestMoves, seconds: float) -> float:
    """Return what a copy of ``seconds`` costs per layer and decode step within its request's patience."""
    return seconds / (tables.num_layers * float(tables.steps[step.j]))


def worth(tables: RedispatchTables, x: IntArray, steps: Sequence[RequestMoves]) -> list[Worth]:
    """Return what ``x`` [N, D], the result of all steps, would lose without each single one of them."""
    if not steps:
        return []
    undone = np.zeros((len(steps), x.shape[1]), np.int64)
    for s, step in enumerate(steps):
        for groups, source, target in step.parts:
            undone[s, source] += groups
            undone[s, target] -= groups
    saved, relieved = _without_each(tables, x.copy(), np.array([step.j for step in steps], np.int64), undone)
    return [Worth(*pair) for pair in zip(saved.tolist(), relieved.tolist(), strict=True)]


@kernel
def _without_each(
    tables: RedispatchTables, x: IntArray, requests: IntArray, undone: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Return the seconds of makespan and of price lost by each of the changes ``undone`` [S, D] of ``requests`` [S]."""
    placement = placement_of(tables, x)
    now_s = max(card_s(tables, float(placement.workers[0])), placement.seconds.max())
    saved, relieved = np.zeros(len(requests)), np.zeros(len(requests))
    for s in range(len(requests)):
        j, without_s, workers = requests[s], 0.0, placement.workers[0]
        for i in range(undone.shape[1]):
            n = undone[s, i]
            if n == 0:
                without_s = max(without_s, placement.seconds[i])
                continue
            without_s = max(without_s, seconds_with(tables, placement, i, n, n * tables.context[j]))
            relieved[s] += short_with(tables, placement, i, j, n) - short_with(tables, placement, i, j, 0)
            if i != tables.primary:
                workers += n
        saved[s] = max(without_s, card_s(tables, float(workers))) - now_s
    return saved, relieved


def pays(tables: RedispatchTables, step: RequestMoves, value: Worth, seconds: float) -> bool:
    """Return whether a step saves its own time within its request's patience, or relieves memory worth as much."""
    gain = value.saved_s + value.relieved_s
    return gain >= per_decode_step_s(tables, step, seconds) and (value.saved_s > 0 or value.relieved_s > 0)


def paying(tables: RedispatchTables, steps: Iterable[RequestMoves]) -> tuple[list[RequestMoves], list[float]]:
    """Drop steps, the least worthwhile first, until all others pay; return these and their gains per second of copy.

    Each step is judged alone, because only an order shows that one step makes room for another.
    """
    kept = list(steps)
    x = applied(tables.now, kept)
    while True:
        gains, losing = judged(tables, x, kept)
        if not losing:
            return kept, gains
        step = kept.pop(losing[0])
        back = tuple(MovedGroups(groups, target, source) for groups, source, target in step.parts)
        x = applied(x, [RequestMoves(step.j, back)])


def judged(tables: RedispatchTables, x: IntArray, steps: Sequence[RequestMoves]) -> tuple[list[float], list[int]]:
    """Return the gains per second of copy of steps that led to ``x``, and the positions of the steps that do not pay.

    The least worthwhile come first.
    """
    gains, losing = list[float](), list[tuple[float, int]]()
    for position, (step, value) in enumerate(zip(steps, worth(tables, x, steps), strict=True)):
        seconds = step_seconds(tables, step)
        gain = value.saved_s + value.relieved_s
        gains.append(gain / max(seconds, 1e-12))
        if not pays(tables, step, value, seconds):
            losing.append((gain - per_decode_step_s(tables, step, seconds), position))
    return gains, [position for _, position in sorted(losing)]


# --- the order of steps


class Ordered(NamedTuple):
    """A step with its wave; after a detour (``is_detour``) a later wave leads to the target."""

    step: RequestMoves
    wave: int
    is_detour: bool


class WaitingStep(NamedTuple):
    """A step that cannot be made, and the reason."""

    step: RequestMoves
    why: str


def order(
    tables: RedispatchTables, before: IntArray, steps: list[RequestMoves], names: tuple[str, ...]
) -> tuple[list[Ordered], list[WaitingStep]]:
    """Order steps from ``before`` [N, D]; earlier ones in ``steps`` go first if there is a choice.

    ``names`` of devices are for the reasons of refused steps.
    """
    room = tables.room - tables.blocks @ before
    waiting, ordered, wave = list(steps), list[Ordered](), 0
    on_detour = set[tuple[int, int]]()  # request, third device
    budget = tables.budget - sum(step.groups * float(tables.num_bytes[step.j]) for step in steps)
    while waiting:
        freed, later = np.zeros_like(room), list[RequestMoves]()
        started = len(ordered)
        for step in waiting:
            fitting, rest = _split(tables, room, step)
            if fitting:
                ordered.append(Ordered(fitting, wave, False))
                _start(tables, room, freed, fitting)
            if rest:
                later.append(rest)
        if len(ordered) == started:
            found = _detour(tables, room, later, on_detour, budget)
            if found is None:
                break
            place, detour, onward = found
            ordered.append(Ordered(detour, wave, True))
            _start(tables, room, freed, detour)
            budget -= detour.groups * float(tables.num_bytes[detour.j])
            on_detour.add((detour.j, detour.parts[0].target))
            rest = later[place].part_of(later[place].groups - detour.groups)
            later[place : place + 1] = [rest] if rest.groups else []
            later.append(onward)
        room, waiting, wave = room + freed, later, wave + 1
    return ordered, [WaitingStep(step, _why(tables, room, step, names)) for step in waiting]


def whole_steps(tables: RedispatchTables, ordered: list[Ordered]) -> list[tuple[RequestMoves | None, float]]:
    """Return, for each step, the whole move that it completes, from where its groups began, and its total seconds.

    A detour finishes nothing and gets None.
    """
    result = list[tuple[RequestMoves | None, float]]()
    began: dict[tuple[int, int], tuple[int, float]] = {}  # (request, third device): source and seconds of the detour
    for step, _, is_detour in ordered:
        seconds, first = step_seconds(tables, step), step.parts[0]
        if is_detour:
            began[step.j, first.target] = (first.source, seconds)
            result.append((None, seconds))
        elif len(step.parts) == 1 and (step.j, first.source) in began:
            source, before_s = began[step.j, first.source]
            result.append((RequestMoves(step.j, (first._replace(source=source),)), seconds + before_s))
        else:
            result.append((step, seconds))
    return result


def _split(
    tables: RedispatchTables, room: IntArray, step: RequestMoves
) -> tuple[RequestMoves | None, RequestMoves | None]:
    """Return the part of a step that has room, and the rest."""
    if len(step.parts) == 1:
        fits = _fitting(tables, room, step, step.parts[0].target)
        if 0 < fits < step.groups:
            return step.part_of(fits), step.part_of(step.groups - fits)
        return (step, None) if fits else (None, step)
    needed = np.zeros_like(room)
    for groups, _, target in step.parts:
        needed[target] += groups * tables.blocks[step.j]
    return (step, None) if np.all(needed <= np.maximum(0, room)) else (None, step)


def _fitting(tables: RedispatchTables, room: IntArray, step: RequestMoves, *targets: int) -> int:
    """Return the groups of a step of one part that the first target has room for, in units of all devices involved."""
    unit = max(int(tables.unit[i]) for i in (step.parts[0].source, *targets))
    return max(0, int(min(step.groups, room[targets[0]] // tables.blocks[step.j]))) // unit * unit


def _start(tables: RedispatchTables, room: IntArray, freed: IntArray, step: RequestMoves) -> None:
    for groups, source, target in step.parts:
        room[target] -= groups * tables.blocks[step.j]
        freed[source] += groups * tables.blocks[step.j]


def _detour(
    tables: RedispatchTables, room: IntArray, waiting: list[RequestMoves], on_detour: set[tuple[int, int]],
    budget: float,
) -> tuple[int, RequestMoves, RequestMoves] | None:  # fmt: skip
    """Return the detour that copies least, of steps whose departure frees blocks that another waits for.

    The result is the step's position among those that wait, the detour, and the onward step. No step takes two detours.
    """
    wanted = {part.target for step in waiting for part in step.parts}
    best, least = None, np.inf
    for place, step in enumerate(waiting):
        _, source, target = step.parts[0]
        if len(step.parts) > 1 or source not in wanted or (step.j, source) in on_detour:
            continue
        for third in np.argsort(-room, kind="stable").tolist():
            fits = _fitting(tables, room, step, third, target)
            if third in (source, target) or not tables.takes[third] or not fits:
                continue
            num_bytes = fits * float(tables.num_bytes[step.j])
            if num_bytes < least and num_bytes <= budget:
                detour = RequestMoves(step.j, (MovedGroups(fits, source, third),))
                onward = RequestMoves(step.j, (MovedGroups(fits, third, target),))
                best, least = (place, detour, onward), num_bytes
            break
    return best


def _why(tables: RedispatchTables, room: IntArray, step: RequestMoves, names: tuple[str, ...]) -> str:
    reasons = list[str]()
    for part in step.parts:
        unit = part.groups if len(step.parts) > 1 else max(int(tables.unit[i]) for i in part[1:])
        needed = unit * int(tables.blocks[step.j])
        if needed > room[part.target]:
            reasons.append(f"{names[part.target]} has {room[part.target]} free KV blocks, {needed} are needed")
    return f"{', '.join(reasons)}; no other move frees them and no third device has room for a detour"
