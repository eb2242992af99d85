"""Pages: every resource exactly once and in order, whatever their size and whatever is added meanwhile."""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.planner.failures import ServiceError
from hetis.planner.resources.pages import MAX_SIZE, read_page_request
from hetis.planner.resources.profiles import Profiles
from hetis.planner.resources.watches import RunningResources
from hetis.planner.store import Store, Transaction
from hetis.v1 import cluster_service_pb2 as cluster_pb
from hetis.v1 import profile_service_pb2 as pb
from tests.planner.resources.served import FakeFleet
from tests.planner.store import samples

IDS = st.text("ab-0", min_size=1, max_size=4).filter(lambda text: not text.startswith("-") and not text.endswith("-"))


@settings(max_examples=40)
@given(
    before=st.sets(IDS, max_size=15),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    added=st.lists(IDS, max_size=5),
)
def test_every_resource_comes_once_and_in_order(before: set[str], sizes: list[int], added: list[str]) -> None:
    async def scenario(url: str) -> None:
        store = await Store.open(url)
        await store.leadership.grant("test")
        profiles = Profiles(store)

        def fill(tx: Transaction) -> None:
            for each in before:
                tx.profiles.insert(samples.profile(f"profiles/{each}"))

        await store.write(fill)
        seen, token, turn = list[str](), "", 0
        to_add = [f"profiles/{each}" for each in added if each not in before]
        while True:
            request = pb.ListProfilesRequest(page_size=sizes[turn % len(sizes)], page_token=token)
            page = await profiles.list(request)
            assert len(page.profiles) <= request.page_size
            assert page.profiles or not page.next_page_token
            seen += [each.name for each in page.profiles]
            token, turn = page.next_page_token, turn + 1
            if not token:
                break
            if to_add:
                name = to_add.pop()
                if await store.read(lambda tx, name=name: tx.profiles.get(name) is None):  # type: ignore[misc]
                    await store.write(lambda tx, name=name: tx.profiles.insert(samples.profile(name)))  # type: ignore[misc]
        await store.close()
        assert seen == sorted(set(seen))
        assert set(seen) >= {f"profiles/{each}" for each in before}

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(f"sqlite:///{folder}/hetis.db"))


@settings(max_examples=25)
@given(times=st.lists(st.integers(0, 3), min_size=1, max_size=12), size=st.integers(1, 5))
def test_lists_by_age_keep_their_order_through_equal_times(times: list[int], size: int) -> None:
    async def scenario(url: str) -> None:
        store = await Store.open(url)
        await store.leadership.grant("test")

        def fill(tx: Transaction) -> None:
            tx.clusters.insert(samples.cluster("clusters/a"))
            for number, time_s in enumerate(times):
                tx.redispatches.insert(samples.redispatch(f"clusters/a/redispatches/{number:02}", time_s=float(time_s)))

        await store.write(fill)
        running, seen, token = RunningResources(store, FakeFleet()), list[str](), ""
        while True:
            request = cluster_pb.ListRedispatchesRequest(parent="clusters/a", page_size=size, page_token=token)
            page = await running.list_redispatches(request)
            seen += [each.name.rpartition("/")[2] for each in page.redispatches]
            token = page.next_page_token
            if not token:
                break
        await store.close()
        newest_first = sorted(((time_s, f"{number:02}") for number, time_s in enumerate(times)), reverse=True)
        assert seen == [name for _, name in newest_first]

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(f"sqlite:///{folder}/hetis.db"))


def token_of(request: pb.ListProfilesRequest) -> str:
    return read_page_request(request).cut(["profiles/a", *"x" * MAX_SIZE], lambda name: name)[1]


def test_a_token_is_of_its_list_and_filter() -> None:
    token = token_of(pb.ListProfilesRequest(page_size=1, gpu_type="L4"))
    again = read_page_request(pb.ListProfilesRequest(page_size=7, page_token=token, gpu_type="L4"))
    assert (again.after, again.size) == ("profiles/a", 7)
    for request in (
        pb.ListProfilesRequest(page_token=token, gpu_type="T4"),
        pb.ListProfilesRequest(page_token=token),
        cluster_pb.ListClustersRequest(page_token=token),
    ):
        with pytest.raises(ServiceError) as caught:
            read_page_request(request)
        assert caught.value.reason_name == "INVALID_PAGE_TOKEN"


def test_pages_have_fifty_resources_unless_said_and_five_hundred_at_most() -> None:
    assert read_page_request(pb.ListProfilesRequest()).size == 50
    assert read_page_request(pb.ListProfilesRequest(page_size=10_000)).size == MAX_SIZE == 500


@given(text=st.text(max_size=40) | st.binary(max_size=40).map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
def test_what_is_no_token_is_refused(text: str) -> None:
    if text:
        with pytest.raises(ServiceError):
            read_page_request(pb.ListProfilesRequest(page_token=text))


@pytest.mark.parametrize("place", [["nul\0"], ["\ud800"], [""], [3], [float("nan"), "a"], [1.5, "a"], [None, None], []])
@pytest.mark.parametrize("newest_first", [False, True])
def test_a_token_that_was_made_up_is_refused(place: list[object], newest_first: bool) -> None:
    digest = json.loads(base64.urlsafe_b64decode(token_of(pb.ListProfilesRequest(page_size=1))))[0]
    made_up = [digest, *([None] if len(place) == 1 else []), *place]
    request = pb.ListProfilesRequest(page_token=base64.urlsafe_b64encode(json.dumps(made_up).encode()).decode())
    if newest_first and place == [1.5, "a"]:
        assert read_page_request(request, newest_first=True).after == (1.5, "a")
        return
    with pytest.raises(ServiceError):
        read_page_request(request, newest_first=newest_first)
