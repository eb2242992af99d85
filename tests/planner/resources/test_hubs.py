"""The bounds on what hubs of clusters remember."""

from __future__ import annotations

import asyncio

import pytest

from hetis.planner.fleet.hubs import Hubs
from hetis.v1 import redispatch_pb2


async def test_old_redispatches_are_forgotten_however_often_they_changed() -> None:
    hub = Hubs(1).cluster("clusters/a")
    for number in range(1003):
        for _ in range(2):
            name = f"clusters/a/redispatches/{number}"
            hub.publish(("redispatch", name), redispatch_pb2.Redispatch(name=name), now_s=0.0)
    events = await anext(hub.watch())
    gone = [event.key[1].rpartition("/")[2] for event in events if event.value is None]
    assert sorted(gone) == ["0", "1", "2"]
    assert len(events) == 1003


async def test_every_watcher_gets_the_error_with_which_the_hubs_are_closed() -> None:
    hubs = Hubs(1)
    watches = [*(hubs.plans.watch() for _ in range(2)), hubs.cluster("clusters/a").watch()]
    for watch in watches:
        assert await anext(watch) == []
    hubs.close(LookupError("the term is over"))
    hubs.close()  # as when the rest of the term ends
    for watch in watches:
        with pytest.raises(LookupError, match="the term is over") as ended:
            await anext(watch)
        assert len(ended.traceback) == 2  # no frames of other watchers
    hubs = Hubs(1)
    watch = hubs.plans.watch()
    assert await anext(watch) == []
    hubs.close()
    with pytest.raises(StopAsyncIteration):
        await anext(watch)


async def test_a_hub_that_is_made_after_the_end_ends_its_watches_as_the_others_do() -> None:
    hubs = Hubs(1)
    hubs.close(LookupError("the term is over"))
    hubs.close()
    watch = hubs.cluster("clusters/late").watch()
    assert await anext(watch) == []
    with pytest.raises(LookupError, match="the term is over"):
        await asyncio.wait_for(anext(watch), timeout=5)


def test_a_hub_is_of_its_cluster_until_the_cluster_goes() -> None:
    hubs = Hubs(1)
    hub = hubs.cluster("clusters/a")
    assert hubs.cluster("clusters/a") is hub
    assert hubs.cluster("clusters/b") is not hub
    hubs.remove_cluster("clusters/a")
    hubs.remove_cluster("clusters/c")
    assert hubs.cluster("clusters/a") is not hub
    assert hubs.round_of("clusters/a") == 0
    hubs.renew_cluster("clusters/a")
    assert hubs.round_of("clusters/a") == 1
