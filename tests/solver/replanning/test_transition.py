"""The order of steps against every other order, on random conflicts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.replanning import transition
from hetis.solver.replanning.transition import Action, Capacity, Start, plan_transition


def capacity_of(old: Sequence[float], new: Sequence[float]) -> Capacity:
    return lambda olds, news: sum(old[i] for i in olds) + sum(new[j] for j in news)


@st.composite
def conflicts(draw: st.DrawFn) -> tuple[list[float], list[float], list[Start], list[int]]:
    old = draw(st.lists(st.floats(1.0, 10.0), min_size=1, max_size=4))
    new = draw(st.lists(st.floats(1.0, 10.0), min_size=0, max_size=4))
    stays = draw(st.lists(st.sampled_from(range(len(old))), max_size=1))
    stopping = [i for i in range(len(old)) if i not in stays]
    needs = st.frozensets(st.sampled_from(stopping)) if stopping else st.just(frozenset[int]())
    starts = [Start(replica=j, needs=draw(needs), start_s=draw(st.floats(1.0, 60.0))) for j in range(len(new))]
    return old, new, starts, stays


def lowest_of_order(order: Sequence[Start], running: frozenset[int], stays: list[int], capacity: Capacity) -> float:
    runs, started, low = running, frozenset[int](), capacity(running, frozenset())
    for start in order:
        runs -= start.needs
        low = min(low, capacity(runs, started))
        started |= {start.replica}
    return min(low, capacity(frozenset(stays), started))


def lost_of_order(
    order: Sequence[Start], running: frozenset[int], free: Sequence[Start], capacity: Capacity, after: float
) -> float:
    """Return the requests that are lost while these start one after another, the ``free`` ones having started."""
    runs, started, lost = running, frozenset(s.replica for s in free), 0.0
    for start in order:
        runs -= start.needs
        lost += start.start_s * max(0.0, after - capacity(runs, started))
        started |= {start.replica}
    return lost


@given(conflicts())
def test_no_order_keeps_more_capacity(drawn: tuple[list[float], list[float], list[Start], list[int]]) -> None:
    old, new, starts, stays = drawn
    capacity, running = capacity_of(old, new), frozenset(range(len(old)))
    found = plan_transition(sorted(running), stays, starts, capacity)
    best = max(lowest_of_order(order, running, stays, capacity) for order in itertools.permutations(starts))
    assert abs(found.lowest - best) < 1e-9
    assert abs(found.best_lowest - best) < 1e-9
    assert found.after == capacity(frozenset(stays), frozenset(s.replica for s in starts))
    # Of the orders that keep as much, no other one loses fewer requests; each may begin with what needs no GPUs.
    free, blocked = ([s for s in starts if bool(s.needs) is needs] for needs in (False, True))
    orders = [[*free, *order] for order in itertools.permutations(blocked)]
    lowest = [lowest_of_order(order, running, stays, capacity) for order in orders]
    losses = [
        lost_of_order(order[len(free) :], running, free, capacity, found.after)
        for order, low in zip(orders, lowest, strict=True)
        if low >= max(lowest)
    ]
    beside = max((s.start_s for s in free), default=0.0) * max(0.0, found.after - capacity(running, frozenset()))
    assert abs(found.lost - beside - min(losses)) < 1e-6


@given(conflicts())
def test_many_starts_have_a_bound_that_holds(drawn: tuple[list[float], list[float], list[Start], list[int]]) -> None:
    old, new, starts, stays = drawn
    capacity, running = capacity_of(old, new), frozenset(range(len(old)))
    with mock.patch.object(transition, "MAX_EXACT", 0):
        found = plan_transition(sorted(running), stays, starts, capacity)
    best = max(lowest_of_order(order, running, stays, capacity) for order in itertools.permutations(starts))
    assert found.lowest <= best + 1e-9
    assert best <= found.best_lowest + 1e-9


def test_capacity_comes_up_before_it_goes_down() -> None:
    starts = [Start(replica=0, needs=frozenset({0}), start_s=10.0), Start(replica=1, needs=frozenset(), start_s=20.0)]
    found = plan_transition([0], [], starts, capacity_of([5.0], [5.0, 6.0]))
    steps = [(step.action, step.replicas, step.capacity, step.capacity_after) for step in found.steps]
    assert steps == [
        (Action.START, (1,), 5.0, 11.0),
        (Action.STOP, (0,), 11.0, 6.0),
        (Action.START, (0,), 6.0, 11.0),
    ]
    assert found.lowest == 5.0
    assert found.seconds == 30.0
    assert found.lost == 20.0 * 6.0 + 10.0 * 5.0
