"""One re-dispatch, with every possible fate of every single message."""

from __future__ import annotations

from functools import cache, partial

import pytest

from tests.protocol.planner_host import NODES
from tests.protocol.transport import Fate, Seen
from tests.protocol.world import State, World

COURSE_S = 4.0  # duration of a course without faults
EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["some", "every"])
FAULTS = [Fate.DROP, Fate.DUPLICATE, Fate.DELAY, Fate.CUT_BEFORE, Fate.CUT_AFTER]


@cache
def recorded() -> tuple[Seen, ...]:
    """Return every message of an undisturbed re-dispatch between three nodes."""
    with World() as world:
        world.serve()
        first = len(world.network.log)
        change_id = world.between_workers()
        world.advance(COURSE_S)
        assert world.redispatches() == {change_id: State.REDISPATCH_STATE_DONE}
        return tuple(world.network.log[first:])


def course(fate: Fate, number: int) -> str:
    """Return the violation after a message met its fate; empty: none."""
    with World() as world:
        world.serve()
        first = len(world.network.log)
        met: list[Seen] = []

        def decide(seen: Seen) -> Fate:
            if seen.number != first + number:
                return Fate.PASS
            met.append(seen)
            return fate

        world.network.fate = decide
        try:
            world.between_workers()
            world.advance(COURSE_S)
            world.heal()
            world.check_another_works()
        except AssertionError as error:
            return f"{fate.value} {' '.join(map(str, met))} (message {number}): {error}"
    return "" if met else f"message {number} was never sent"


def test_a_re_dispatch_takes_the_messages_that_it_should() -> None:
    kinds = [f"{seen.way.value} {seen.kind}" for seen in recorded()]
    assert kinds.count("down delta.prepare") == kinds.count("up change_status.2") == 3
    assert kinds.count("down delta.commit") == 1
    assert kinds.count("down delta.resolved") == kinds.count("up change_status.5") == 3
    assert "up nack" not in kinds


def numbers(*, noise: bool) -> list[int]:
    """Return the numbers of recorded messages; heartbeats and reports are noise."""
    return [i for i, seen in enumerate(recorded()) if noise == (seen.kind in ("heartbeat", "report"))]


def one_of_each_kind(turn: int) -> list[int]:
    """Return a message of each kind except noise; ``turn`` chooses, so that faults meet different nodes."""
    kinds: dict[str, list[int]] = {}
    for number in numbers(noise=False):
        seen = recorded()[number]
        kinds.setdefault(f"{seen.way.value} {seen.kind}", []).append(number)
    return sorted(of_kind[turn % len(of_kind)] for of_kind in kinds.values())


@EVERY
@pytest.mark.parametrize("fate", FAULTS, ids=lambda fate: fate.name.lower())
def test_whatever_happens_to_one_message_costs_nothing_but_time(fate: Fate, every: bool) -> None:
    chosen = numbers(noise=False) if every else one_of_each_kind(FAULTS.index(fate))
    wrong = [found for number in chosen if (found := course(fate, number))]
    assert not wrong, "\n".join(wrong)


def test_what_nodes_say_of_changes_that_are_over_is_not_answered_for_ever() -> None:
    with World() as world:
        world.serve()
        change_id = world.between_workers(prepare_s=1.0, copy_s=30.0)
        assert change_id is not None
        world.advance(10.0)
        assert world.redispatches()[change_id] == State.REDISPATCH_STATE_ABORTED
        for node in NODES:
            world.cut(node)
        world.advance(5.0)
        world.heal()


@pytest.mark.soak
@pytest.mark.parametrize("fate", FAULTS, ids=lambda fate: fate.name.lower())
def test_whatever_happens_to_a_heartbeat_or_a_report_costs_nothing_but_time(fate: Fate) -> None:
    wrong = [found for number in numbers(noise=True) if (found := course(fate, number))]
    assert not wrong, "\n".join(wrong)


def _at(numbers: set[int], fate: Fate, seen: Seen) -> Fate:
    return fate if seen.number in numbers else Fate.PASS


@pytest.mark.soak
@pytest.mark.parametrize("fate", FAULTS, ids=lambda fate: fate.name.lower())
def test_whatever_happens_to_two_messages_costs_nothing_but_time(fate: Fate) -> None:
    """The second message is one of those to which the first fault led."""
    wrong = []
    for number in range(len(recorded())):
        for later in range(1, 8):
            with World(seed=later) as world:
                world.serve()
                first = len(world.network.log)
                at = {first + number, first + number + later}
                world.network.fate = partial(_at, at, fate)
                try:
                    world.between_workers()
                    world.advance(COURSE_S)
                    world.heal()
                    world.check_another_works()
                except AssertionError as error:
                    wrong.append(f"{fate.value} {number} and {number + later}: {error}")
    assert not wrong, "\n".join(wrong)
