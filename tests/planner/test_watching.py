"""Hubs: every watcher ends up with the last state of all resources, however slow it is and whenever it pauses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.watching import Event, Hub, LeftBehindError

KEYS = st.sampled_from("abcd")
CHANGES = st.lists(st.tuples(KEYS, st.none() | st.integers(0, 9)), max_size=30)


def applied(state: dict[str, int], events: list[Event[str, int]]) -> int:
    """Apply events to a watcher's state; return the sequence number of the last one."""
    for event in events:
        if event.value is None:
            state.pop(event.key, None)
        else:
            state[event.key] = event.value
    return events[-1].sequence if events else 0


async def now(watch: AsyncIterator[list[Event[str, int]]]) -> list[Event[str, int]]:
    return await asyncio.wait_for(anext(watch), 5)


@given(before=CHANGES, meanwhile=st.lists(CHANGES, max_size=5))
def test_a_slow_watcher_misses_states_but_never_the_last(
    before: list[tuple[str, int | None]], meanwhile: list[list[tuple[str, int | None]]]
) -> None:
    async def scenario() -> None:
        hub, truth, seen = Hub[str, int](epoch=1), dict[str, int](), dict[str, int]()

        def publish(changes: list[tuple[str, int | None]]) -> None:
            for key, value in changes:
                hub.publish(key, value, now_s=0.0)
                truth.pop(key, None)
                if value is not None:
                    truth[key] = value

        publish(before)
        watch = hub.watch()
        last = applied(seen, await now(watch))
        assert seen == truth
        for changes in meanwhile:
            publish(changes)
            if changes:
                events = await now(watch)
                assert len({event.key for event in events}) == len(events) <= len(changes)
                assert [event.sequence for event in events] == sorted(event.sequence for event in events)
                assert all(event.sequence > last for event in events)
                last = applied(seen, events)
            assert seen == truth
        await watch.aclose()  # type: ignore[attr-defined]

    asyncio.run(scenario())


@given(before=CHANGES, after=CHANGES, most_gone=st.integers(0, 3))
def test_a_watcher_that_resumes_hears_all_it_missed_or_that_it_must_begin_anew(
    before: list[tuple[str, int | None]], after: list[tuple[str, int | None]], most_gone: int
) -> None:
    async def scenario() -> None:
        hub, truth, seen = Hub[str, int](epoch=3, most_gone=most_gone), dict[str, int](), dict[str, int]()
        for changes in (before, after):
            for key, value in changes:
                hub.publish(key, value, now_s=0.0)
                truth.pop(key, None)
                if value is not None:
                    truth[key] = value
            if changes is before:
                last = applied(seen, await now(hub.watch())) or hub.sequence
        if not hub.is_too_old(last):
            applied(seen, await now(hub.watch(last)))
            assert seen == truth

    asyncio.run(scenario())


async def test_a_watcher_that_waits_is_woken_by_the_next_change() -> None:
    hub = Hub[str, int](epoch=1)
    watch = hub.watch()
    assert await now(watch) == []
    waiting = asyncio.create_task(now(watch))
    await asyncio.sleep(0)
    sequence = hub.publish("a", 1, now_s=7.0)
    assert await waiting == [Event(sequence, "a", 1, 7.0)]


async def test_closing_ends_all_watches() -> None:
    hub = Hub[str, int](epoch=1)
    hub.publish("a", 1, now_s=0.0)

    async def watch() -> int:
        return sum([len(events) async for events in hub.watch()])

    watches = [asyncio.create_task(watch()) for _ in range(3)]
    await asyncio.sleep(0)
    hub.close()
    assert await asyncio.wait_for(asyncio.gather(*watches), 5) == [1, 1, 1]


def test_sequences_of_another_term_are_too_old() -> None:
    old, new = Hub[str, int](epoch=1), Hub[str, int](epoch=2)
    last = old.publish("a", 1, now_s=0.0)
    first = new.publish("a", 2, now_s=0.0)
    assert first > last
    assert new.is_too_old(last)
    assert old.is_too_old(first)  # a token from the future: the store was restored from a backup
    assert not new.is_too_old(first)
    assert not new.is_too_old(0)


def test_what_was_removed_long_ago_is_forgotten_and_known_to_be() -> None:
    hub = Hub[str, int](epoch=1, most_gone=1)
    seen = hub.publish("a", 1, now_s=0.0)
    hub.publish("b", 1, now_s=0.0)
    gone = hub.publish("a", None, now_s=0.0)
    assert not hub.is_too_old(seen)
    hub.publish("b", None, now_s=0.0)
    assert hub.is_too_old(seen)
    assert not hub.is_too_old(gone)


async def test_a_watcher_that_missed_a_forgotten_removal_is_told_so() -> None:
    """In the past it showed what was removed for ever: only a watch that was opened again learned of it."""
    hub = Hub[str, int](epoch=1, most_gone=1)
    for key in "abc":
        hub.publish(key, 1, now_s=0.0)
    behind, level = hub.watch(), hub.watch()
    assert len(await now(behind)) == len(await now(level)) == 3
    hub.publish("a", None, now_s=0.0)
    assert [event.key for event in await now(level)] == ["a"]
    hub.publish("b", None, now_s=0.0)  # the removal of a is forgotten
    with pytest.raises(LeftBehindError):
        await now(behind)
    assert [event.key for event in await now(level)] == ["b"]
    with pytest.raises(LeftBehindError):
        await now(hub.watch(after=hub.sequence - 2))
