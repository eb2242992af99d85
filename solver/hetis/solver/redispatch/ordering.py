"""An order of steps in which each has room at its targets while its sources still hold the blocks.

Steps go in waves: those of one wave fit together, and what they free is for the next. A step of one part is split if
only some of its groups fit. If nothing fits, the remaining steps wait for each other in a cycle. Then one of them takes
a detour through a third device with room and reaches its target later; a step that finds no detour is refused.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.problem import FloatArray, IntArray
from hetis.solver.redispatch.moves import MovedGroups, RequestMoves, step_seconds
from hetis.solver.redispatch.tables import RedispatchTables


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


def whole_steps(
    tables: RedispatchTables, link_byte_s: FloatArray, ordered: list[Ordered]
) -> list[tuple[RequestMoves | None, float]]:
    """Return for each step the whole that it completes, from where its groups began, and the seconds of all its steps.

    A detour completes nothing and gets None.
    """
    result = list[tuple[RequestMoves | None, float]]()
    began: dict[tuple[int, int], tuple[int, float]] = {}  # request, third device: source and seconds of the detour
    for step, _, is_detour in ordered:
        seconds, first = step_seconds(tables, link_byte_s, step), step.parts[0]
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
    tables: RedispatchTables,
    room: IntArray,
    waiting: list[RequestMoves],
    on_detour: set[tuple[int, int]],
    budget: float,
) -> tuple[int, RequestMoves, RequestMoves] | None:
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
                detour, onward = (
                    RequestMoves(step.j, (MovedGroups(fits, source, third),)),
                    RequestMoves(step.j, (MovedGroups(fits, third, target),)),
                )
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
