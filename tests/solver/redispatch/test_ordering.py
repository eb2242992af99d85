"""An order of moves respects memory, budget and units at every moment, and leads to the moves' result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.dispatch.dispatch_problem import IntArray
from hetis.solver.redispatch.moves import MovedGroups, RequestMoves, applied, order, steps_between, whole_steps
from hetis.solver.redispatch.redispatch_tables import RedispatchTables, tables_of
from tests.solver.redispatch.instances import random_problem

NAMES = ("a", "b", "c", "d")


@st.composite
def journeys(draw: st.DrawFn) -> tuple[RedispatchTables, IntArray, IntArray]:
    """Return a stage, and two placements on it that each barely fit."""
    seed, tp = draw(st.integers(0, 2**32)), draw(st.sampled_from([None, 1, 2]))
    problems = [random_problem(s, num_devices=4, num_requests=5, tp=tp) for s in (seed, seed + 1)]
    tables = tables_of(problems[0])
    before, after = (problem.snapshot.groups for problem in problems)
    spare = np.array(draw(st.lists(st.sampled_from([0, 0, 50, 400]), min_size=4, max_size=4)))
    room = np.maximum(tables.blocks @ before, tables.blocks @ after) + spare
    needed = sum(step.groups * float(tables.num_bytes[step.j]) for step in steps_between(tables, before, after))
    budget = needed * draw(st.sampled_from([1.0, 1.2, 1.5, 4.0]))
    return tables._replace(room=room, budget=float(budget)), before, after


@given(journeys())
def test_every_wave_fits_while_its_sources_still_hold_their_blocks(
    journey: tuple[RedispatchTables, IntArray, IntArray],
) -> None:
    tables, before, after = journey
    ordered, waiting = order(tables, before, steps_between(tables, before, after), NAMES)
    x = before
    for wave in sorted({one.wave for one in ordered}):
        steps = [one.step for one in ordered if one.wave == wave]
        arriving = np.zeros(4, np.int64)
        for step in steps:
            for groups, _, target in step.parts:
                arriving[target] += groups * tables.blocks[step.j]
        used = tables.blocks @ x
        assert np.all((used + arriving <= tables.room) | (arriving == 0))
        x = applied(x, steps)
        assert np.all(x >= 0)
    left = [one.step for one in waiting]
    assert np.array_equal(applied(x, left), after)
    done = [step for step, _ in whole_steps(tables, ordered) if step is not None]
    if not any(one.is_detour for one in ordered):
        assert np.array_equal(applied(applied(before, done), left), after)


@given(journeys())
def test_detours_keep_the_budget(journey: tuple[RedispatchTables, IntArray, IntArray]) -> None:
    tables, before, after = journey
    ordered, _ = order(tables, before, steps_between(tables, before, after), NAMES)
    copied = sum(one.step.groups * float(tables.num_bytes[one.step.j]) for one in ordered)
    assert copied <= tables.budget * (1 + 1e-12)


@given(journeys())
def test_the_primary_takes_and_gives_whole_units(journey: tuple[RedispatchTables, IntArray, IntArray]) -> None:
    tables, before, after = journey
    ordered, _ = order(tables, before, steps_between(tables, before, after), NAMES)
    for one in ordered:
        moved = np.zeros(4, np.int64)
        for groups, source, target in one.step.parts:
            moved[target] += groups
            moved[source] -= groups
        assert np.all(moved % tables.unit == 0)


def crowded(*, room: tuple[int, ...], budget_groups: float, tp: int | None = None) -> tuple[RedispatchTables, IntArray]:
    """Requests of four groups and ten blocks each, one on every device but the last."""
    num = len(room) - 1
    problem = random_problem(0, num_devices=num + 1, num_requests=num, tp=tp)
    groups = 4 * np.eye(num, num + 1, dtype=np.int64)
    snapshot = replace(problem.snapshot, groups=groups, context_tokens=np.full(num, 160))
    devices = tuple(replace(device, total_blocks=10_000) for device in snapshot.devices)
    tables = tables_of(replace(problem, snapshot=replace(snapshot, devices=devices)))
    assert tables.blocks.tolist() == [10] * num
    budget = budget_groups * float(tables.num_bytes[0])
    return tables._replace(room=np.array(room), budget=budget), groups


SWAP = [RequestMoves(0, (MovedGroups(4, 0, 1),)), RequestMoves(1, (MovedGroups(4, 1, 0),))]


def test_requests_that_swap_full_devices_go_by_a_third_one() -> None:
    tables, before = crowded(room=(40, 40, 40), budget_groups=12)
    ordered, waiting = order(tables, before, SWAP, NAMES)
    assert waiting == []
    assert [(one.step.parts, one.wave, one.is_detour) for one in ordered] == [
        ((MovedGroups(4, 0, 2),), 0, True),
        ((MovedGroups(4, 1, 0),), 1, False),
        ((MovedGroups(4, 2, 1),), 2, False),
    ]


@pytest.mark.parametrize(("groups", "is_enough"), [(8, False), (11, False), (12, True)])
def test_a_detour_copies_twice_and_the_budget_knows(groups: int, is_enough: bool) -> None:
    tables, before = crowded(room=(40, 40, 40), budget_groups=groups)
    ordered, waiting = order(tables, before, SWAP, NAMES)
    assert (len(ordered), len(waiting)) == ((3, 0) if is_enough else (0, 2))


@pytest.mark.parametrize(("groups", "is_enough"), [(9.9, False), (10, True)])
def test_a_detour_takes_what_the_third_device_has_room_for(groups: float, is_enough: bool) -> None:
    tables, before = crowded(room=(40, 40, 20), budget_groups=groups)
    ordered, _ = order(tables, before, SWAP, NAMES)
    copied = [one.step.groups for one in ordered]
    assert copied == ([2, 2, 2, 2, 2] if is_enough else [])


@pytest.mark.parametrize(("groups", "detours"), [(19, 0), (20, 1), (23, 1), (24, 2)])
def test_a_second_detour_has_what_the_first_leaves_of_the_budget(groups: int, detours: int) -> None:
    # Two pairs of requests swap full devices by way of the same fifth one: 16 groups, and 4 for every detour.
    tables, before = crowded(room=(40, 40, 40, 40, 40), budget_groups=groups)
    swaps = [RequestMoves(j, (MovedGroups(4, j, j ^ 1),)) for j in range(4)]
    ordered, waiting = order(tables, before, swaps, ("a", "b", "c", "d", "e"))
    assert sum(one.is_detour for one in ordered) == detours
    assert len(waiting) == 4 - 2 * detours


def test_only_whole_units_of_the_primary_move_where_fewer_would_fit() -> None:
    tables, before = crowded(room=(40, 70, 0), budget_groups=100, tp=2)
    ordered, waiting = order(tables, before, [SWAP[0]], NAMES)
    assert [one.step.parts for one in ordered] == [
        (MovedGroups(2, 0, 1),)
    ]  # three fit, and the primary gives two at a time
    assert [one.step.parts for one in waiting] == [(MovedGroups(2, 0, 1),)]
