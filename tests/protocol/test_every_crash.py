"""One re-dispatch, in which a planner, an agent or an engine dies: at every write, every call and every message."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.protocol.planner_host import NODES
from tests.protocol.test_every_message import COURSE_S, EVERY, numbers, one_of_each_kind, recorded
from tests.protocol.transport import Fate, Seen
from tests.protocol.world import World

DOWN_S = 1.0  # from a death to the next start
Prepare = Callable[[World], Callable[[], bool]]


def course(what: str, prepare: Prepare) -> str:
    """Return the violation, empty if none, after a death set up by ``prepare``, whose result tells if it happened."""
    with World() as world:
        world.serve()
        came = prepare(world)
        try:
            world.between_workers()
            for _ in range(int(COURSE_S / DOWN_S)):
                world.advance(DOWN_S)
                if world.planner is None:
                    world.start_planner()
                for node, agent in world.agents.items():
                    if agent.is_dead:
                        world.restart_agent(node)
            assert came(), "nobody died: the course has fewer steps than before"
            world.heal()
            assert not (holes := world.ledger.holes(world.engines, of_wounded=True)), holes
            world.check_another_works()
        except AssertionError as error:
            return f"{what}: {error}"
    return ""


def uneventful(counted: Callable[[World], int]) -> int:
    """Return the increase of a count over the course without a death."""
    with World() as world:
        world.serve()
        before = counted(world)
        world.between_workers()
        world.advance(COURSE_S)
        return counted(world) - before


def assert_all(found: Iterator[str]) -> None:
    wrong = [one for one in found if one]
    assert not wrong, "\n".join(wrong)


def chosen(total: int, *, after: bool, every: bool) -> range:
    """Return numbers of writes. A death after one is nearly one before the next, so every second number suffices."""
    return range(total) if every else range(int(after), total, 2)


@EVERY
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_the_planner_may_die_at_every_write(after: bool, every: bool) -> None:
    def at(number: int) -> Prepare:
        def prepare(world: World) -> Callable[[], bool]:
            assert world.planner is not None
            store = world.planner.store
            store.dies_at, store.dies_after = store.num_writes + number, after
            world.planners_words_arrive = not after
            return lambda: store.is_dead

        return prepare

    total = uneventful(lambda world: world.planner.store.num_writes if world.planner else 0)
    assert total >= 4  # proposed, committing, releasing, done
    assert_all(course(f"planner, write {number}", at(number)) for number in chosen(total, after=after, every=every))


@EVERY
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("node", NODES)
def test_an_agent_may_die_at_every_write(node: str, after: bool, every: bool) -> None:
    def at(number: int) -> Prepare:
        def prepare(world: World) -> Callable[[], bool]:
            state = world.agents[node].state
            state.dies_at, state.dies_after = state.num_writes + number, after
            world.agents[node].its_words_arrive = not after
            return lambda: state.is_dead

        return prepare

    total = uneventful(lambda world: world.agents[node].state.num_writes)
    assert total >= 2
    assert_all(
        course(f"agent of {node}, write {number}", at(number)) for number in chosen(total, after=after, every=every)
    )


@pytest.mark.parametrize("node", NODES)
def test_an_engine_may_die_at_every_call(node: str) -> None:
    def at(number: int) -> Prepare:
        def prepare(world: World) -> Callable[[], bool]:
            host = world.engines[node]
            host.dies_at = len(host.calls) + number
            return lambda: host.dies_at is None

        return prepare

    total = uneventful(lambda world: len(world.engines[node].calls))
    assert total >= 3
    assert_all(course(f"engine of {node}, call {number}", at(number)) for number in range(total))


@pytest.mark.parametrize("node", NODES)
def test_the_answer_to_every_call_of_an_engine_may_be_lost(node: str) -> None:
    def at(number: int) -> Prepare:
        def prepare(world: World) -> Callable[[], bool]:
            host = world.engines[node]
            host.loses = len(host.calls) + number
            return lambda: host.loses is None

        return prepare

    total = uneventful(lambda world: len(world.engines[node].calls))
    assert_all(course(f"engine of {node}, call {number}", at(number)) for number in range(total))


def kill_at(number: int, kill: Callable[[World], None]) -> Prepare:
    """Return a preparation that kills when this message is sent, which is lost if one of its ends is killed."""

    def prepare(world: World) -> Callable[[], bool]:
        first, met = len(world.network.log), []

        def decide(seen: Seen) -> Fate:
            if seen.number == first + number:
                met.append(seen)
                world.loop.call_soon(kill, world)
            return Fate.PASS

        world.network.fate = decide
        return lambda: bool(met)

    return prepare


@EVERY
def test_the_planner_may_die_at_every_message(every: bool) -> None:
    assert_all(
        course(f"planner at {recorded()[number]}", kill_at(number, World.kill_planner))
        for number in (numbers(noise=False) if every else one_of_each_kind(0))
    )


@pytest.mark.soak
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("who", ["agent", "engine", "both"])
def test_agents_and_engines_may_die_at_every_message(who: str, node: str) -> None:
    def kill(world: World) -> None:
        if who != "engine":
            world.agents[node].kill()
        if who != "agent":
            world.engines[node].restart()

    assert_all(
        course(f"{who} of {node} at {recorded()[number]}", kill_at(number, kill)) for number in numbers(noise=False)
    )


@pytest.mark.soak
@pytest.mark.parametrize("node", NODES)
def test_planner_and_agent_may_die_together_at_every_message(node: str) -> None:
    def kill(world: World) -> None:
        world.agents[node].kill()
        world.kill_planner()

    assert_all(
        course(f"planner and agent of {node} at {recorded()[number]}", kill_at(number, kill))
        for number in numbers(noise=False)
    )
