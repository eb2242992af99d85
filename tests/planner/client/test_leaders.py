"""Clients of several planners find the one that leads, and find it again when it changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import grpc
import pytest
from google.rpc import code_pb2

from examples.processes import free_ports
from hetis.commands.endpoints import STANDBY_ANSWER, Endpoint, LeaderSearch, resolve_endpoints, split_endpoints
from hetis.planner.client import CallError, Client, Connection
from hetis.planner.client.attempts import Attempts
from hetis.v1 import cluster_pb2, cluster_service_pb2, plan_pb2, plan_service_pb2
from tests.planner.client.either import EITHER, Kind, done, items, opened
from tests.planner.client.fake_planner import FakePlanner, refuse, serving

GET = plan_service_pb2.GetPlanRequest(name="plans/night")
WATCH = plan_service_pb2.WatchPlanRequest(name="plans/night")
CREATE = cluster_service_pb2.CreateClusterRequest(cluster_id="new", cluster=cluster_pb2.Cluster())
READY = plan_pb2.PLAN_STATE_READY


def standing_by(leader: str) -> Callable[[str, grpc.ServicerContext], None]:
    def fail(_method: str, context: grpc.ServicerContext) -> None:
        metadata = {"leader": "first:1", "leader_address": leader} if leader else {}
        refuse(context, code_pb2.UNAVAILABLE, "NOT_LEADER", "another planner is the leader", metadata=metadata)

    return fail


@pytest.fixture
def pair() -> Iterator[tuple[FakePlanner, FakePlanner]]:
    """A leader, and a standby that names it."""
    with serving(FakePlanner()) as leader, serving(FakePlanner()) as standby:
        leader.plans["plans/night"] = plan_pb2.Plan(name="plans/night", state=READY)
        standby.plans["plans/night"] = plan_pb2.Plan(name="plans/night", state=READY)
        standby.fail = standing_by(leader.address)
        yield leader, standby


async def check_served(kind: Kind, address: str) -> None:
    async with opened(kind, address) as client:
        assert (await done(client.plans.GetPlan(GET, timeout=20))).plan.name == "plans/night"
        await done(client.clusters.CreateCluster(CREATE, timeout=20))
        assert [one.plan.name async for one in items(client, client.plans.WatchPlan(WATCH))] == ["plans/night"]


SILENCE = CallError("no answer", code=grpc.StatusCode.DEADLINE_EXCEEDED)
UNDONE = CallError(
    "nothing was changed", code=grpc.StatusCode.UNAVAILABLE, reason="STORE_UNAVAILABLE", metadata={"changed": "no"}
)
AWAY = CallError("another planner is the leader", code=grpc.StatusCode.UNAVAILABLE, reason="NOT_LEADER")
BROKEN = CallError("no such method", code=grpc.StatusCode.UNIMPLEMENTED)
TAKEN = CallError("it is there already", code=grpc.StatusCode.ALREADY_EXISTS, reason="ALREADY_EXISTS")


@pytest.mark.parametrize(
    ("earlier", "last", "changed"),
    [
        ([SILENCE], UNDONE, "unknown"),
        ([SILENCE, UNDONE], AWAY, "unknown"),
        ([UNDONE, AWAY], UNDONE, "no"),
        ([AWAY], AWAY, None),
        ([SILENCE], TAKEN, None),  # had the first attempt been carried out, the leader would have repeated its answer
    ],
    ids=["silence", "silence before", "never", "elsewhere", "refused"],
)
def test_a_call_says_unknown_if_any_of_its_attempts_may_have_been_carried_out(
    earlier: Sequence[CallError], last: CallError, changed: str | None
) -> None:
    """The last planner called knows only its own attempt; a history with faults found this."""
    now_s = 0.0
    search = LeaderSearch(("127.0.0.1:1", "127.0.0.1:2"), is_plain=True)

    def attempts(*, may_change: bool) -> Attempts:
        return Attempts(leaders=search, end_s=10.0, clock=lambda: now_s, may_change=may_change)

    for one, expected in (
        (attempts(may_change=True), changed),
        (attempts(may_change=False), last.metadata.get("changed")),
    ):
        now_s = 0.0
        for error in earlier:
            one.next_wait_s(search.present, error)
        now_s = 10.0
        with pytest.raises(CallError) as caught:
            one.next_wait_s(search.present, last)
        assert caught.value.metadata.get("changed") == expected
        is_told = str(caught.value).startswith("an earlier attempt of this call may have been carried out")
        assert is_told == (expected == "unknown")  # before what the last planner says of its own attempt
        assert (caught.value.code, caught.value.reason) == (last.code, last.reason)


@pytest.mark.parametrize(
    ("last", "message", "code", "reason", "changed"),
    [
        (
            SILENCE,
            "the call may have been carried out: no planner answered its last attempt (no answer); one before was"
            " refused: nothing was changed",
            UNDONE.code,
            UNDONE.reason,
            "unknown",
        ),
        (AWAY, f"{AWAY}; one before was refused: nothing was changed", AWAY.code, AWAY.reason, None),
        (BROKEN, "no such method", BROKEN.code, "", None),  # an answer that has nothing to do with the earlier one
    ],
    ids=["silence", "a standby", "another answer"],
)
def test_what_a_leader_said_is_not_lost_when_the_deadline_cuts_the_last_attempt_short(
    last: CallError, message: str, code: grpc.StatusCode, reason: str, changed: str | None
) -> None:
    """A user whose planner's disk was full was told to look at TLS."""
    now_s = 0.0
    search = LeaderSearch(("127.0.0.1:1", "127.0.0.1:2"), is_plain=True)
    one = Attempts(leaders=search, end_s=10.0, clock=lambda: now_s, may_change=True)
    for error in (UNDONE, AWAY):
        one.next_wait_s(search.present, error)
    now_s = 10.0
    with pytest.raises(CallError) as caught:
        one.next_wait_s(search.present, last)
    assert str(caught.value) == message
    assert (caught.value.code, caught.value.reason) == (code, reason)
    assert caught.value.metadata.get("changed") == changed


@EITHER
async def test_a_standby_is_left_for_the_leader_that_it_names(
    pair: tuple[FakePlanner, FakePlanner], kind: Kind
) -> None:
    leader, standby = pair
    await check_served(kind, standby.address)
    assert leader.calls["CreateCluster"] == 1
    assert standby.calls["GetPlan"] <= 8  # gRPC itself retries with the fake planner; hetis-planner prevents that


LIST = cluster_service_pb2.ListClustersRequest()


def reading(leader: str) -> Callable[[str, grpc.ServicerContext], None]:
    """Answer as a standby does."""
    return lambda _method, context: context.set_trailing_metadata(((STANDBY_ANSWER, leader),))


async def num_connected(kind: Kind, address: str, *, of_standby: bool) -> int:
    async with opened(kind, address) as client:
        answer = await done(client.clusters.ListClusters(LIST, timeout=20))
        assert client.has_standby_answered == of_standby
        return int(answer.clusters[0].num_connected_nodes)


@EITHER
@pytest.mark.parametrize("is_named", [True, False])
async def test_what_only_the_leader_knows_is_not_read_from_a_standby(
    pair: tuple[FakePlanner, FakePlanner], kind: Kind, is_named: bool
) -> None:
    """In the past whoever named an old leader first saw a fleet without agents after each takeover."""
    leader, standby = pair
    name = "clusters/a"
    leader.clusters[name] = cluster_pb2.Cluster(name=name, num_connected_nodes=12)
    standby.clusters[name] = cluster_pb2.Cluster(name=name)
    standby.fail = reading(leader.address if is_named else "")
    assert await num_connected(kind, f"{standby.address},{leader.address}", of_standby=False) == 12
    if is_named:
        assert await num_connected(kind, standby.address, of_standby=False) == 12


@EITHER
async def test_a_standby_answers_reads_while_no_leader_does(pair: tuple[FakePlanner, FakePlanner], kind: Kind) -> None:
    _, standby = pair
    standby.clusters["clusters/a"] = cluster_pb2.Cluster(name="clusters/a")
    nobody = f"127.0.0.1:{free_ports()}"
    for leader in (nobody, ""):
        standby.fail = reading(leader)
        for addresses in (standby.address, f"{nobody},{standby.address}"):
            assert await num_connected(kind, addresses, of_standby=True) == 0


def test_a_refusal_of_the_leader_counts_more_than_the_answer_of_a_standby(
    pair: tuple[FakePlanner, FakePlanner],
) -> None:
    leader, standby = pair
    standby.fail = reading(leader.address)
    del leader.plans["plans/night"]
    with Client(standby.address) as client, pytest.raises(CallError) as caught:
        client.plans.GetPlan(GET, timeout=20)
    assert caught.value.reason == "NOT_FOUND"


@EITHER
async def test_addresses_are_tried_until_one_leads(pair: tuple[FakePlanner, FakePlanner], kind: Kind) -> None:
    leader, standby = pair
    standby.fail = standing_by("")  # it does not know the leader
    await check_served(kind, f"127.0.0.1:{free_ports()},{standby.address},{leader.address}")
    assert leader.calls["CreateCluster"] == 1


def test_a_call_goes_on_while_there_is_no_leader_with_one_request_id(pair: tuple[FakePlanner, FakePlanner]) -> None:
    """The leader is dead, and the standby names it until it takes over itself: no call fails because of that."""
    _, standby = pair
    standby.fail = standing_by(f"127.0.0.1:{free_ports()}")
    waits = list[float]()

    def sleep(wait_s: float) -> None:
        waits.append(wait_s)
        if len(waits) == 5:
            standby.fail = lambda method, context: None

    with Client(f"127.0.0.1:{free_ports()},{standby.address}", sleep=sleep) as client:
        client.clusters.CreateCluster(CREATE, timeout=30)
    assert len(waits) == 5
    assert waits[0] <= 0.1
    assert max(waits) <= 1
    assert CREATE.request_id == ""


def test_nobody_there_is_an_error_at_the_deadline() -> None:
    with Client(f"127.0.0.1:{free_ports()},127.0.0.1:{free_ports()}") as client, pytest.raises(CallError) as caught:
        client.plans.GetPlan(GET, timeout=1)
    assert caught.value.is_unreachable


def test_other_errors_are_the_callers(pair: tuple[FakePlanner, FakePlanner]) -> None:
    leader, standby = pair
    request = plan_service_pb2.GetPlanRequest(name="plans/none")
    with Client(f"{leader.address},{standby.address}") as client, pytest.raises(CallError) as caught:
        client.plans.GetPlan(request)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert leader.calls["GetPlan"] == 1


def test_threads_share_what_they_found(pair: tuple[FakePlanner, FakePlanner]) -> None:
    leader, standby = pair
    with Client(f"{standby.address},{leader.address}") as client:
        threads = [threading.Thread(target=client.plans.GetPlan, args=(GET,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.plans.GetPlan(GET)
    assert leader.calls["GetPlan"] == 5


def test_a_name_with_several_records_is_several_places_of_one_certificate() -> None:
    def records(host: str, _port: int) -> Sequence[str]:
        return {"planners.example": ("10.0.0.1", "fd00::2"), "one.example": ("10.0.0.9",)}.get(host, ())

    addresses = split_endpoints("planners.example:8470, one.example:8470,10.1.1.1:1,unix:/run/p.sock")
    assert resolve_endpoints(addresses, records) == (
        Endpoint("10.0.0.1:8470", "planners.example"),
        Endpoint("[fd00::2]:8470", "planners.example"),
        Endpoint("one.example:8470"),
        Endpoint("10.1.1.1:1"),
        Endpoint("unix:/run/p.sock"),
    )


@pytest.mark.parametrize("text", ["", "planner", "a:1,b", "a:0", "a:99999", ":1"])
def test_what_is_no_list_of_addresses_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address, expected HOST:PORT"):
        split_endpoints(text)


@pytest.mark.parametrize(
    ("connection", "named", "goes"),
    [
        (Connection(address="127.0.0.1:1"), "127.0.0.1:2", True),
        (Connection(address="127.0.0.1:1"), "10.0.0.1:2", False),
        (Connection(address="10.0.0.9:1", plaintext=True), "10.0.0.1:2", False),
        (Connection(address="10.0.0.9:1,10.0.0.1:2", plaintext=True), "10.0.0.1:2", True),
        (Connection(address="10.0.0.9:1"), "10.0.0.1:2", True),  # with TLS, where its certificate identifies it
        (Connection(address="10.0.0.9:1"), "nonsense", False),
    ],
)
def test_a_leader_that_is_named_is_not_gone_to_in_the_clear(connection: Connection, named: str, goes: bool) -> None:
    leaders = LeaderSearch(connection.addresses, is_plain=connection.is_plain)
    leaders.failed(leaders.present, named, set())
    assert (leaders.present.address == named) is goes


def test_names_are_looked_up_again_when_all_places_have_failed() -> None:
    known = [["10.0.0.1", "10.0.0.2"], ["10.0.0.2", "10.0.0.3"]]
    search = LeaderSearch(
        ("planners.example:1",),
        is_plain=False,
        resolve=lambda _: tuple(Endpoint(f"{ip}:1", "planners.example") for ip in known[0]),
    )
    tried = set[Endpoint]()
    assert search.failed(search.present, "", tried)
    assert search.present.address == "10.0.0.2:1"
    assert not search.is_stale
    assert not search.failed(search.present, "", tried)
    assert search.is_stale
    del known[0]
    search.refresh()
    tried.clear()
    assert search.present.address == "10.0.0.2:1"
    assert search.failed(search.present, "", tried)
    assert search.present.address == "10.0.0.3:1"


def test_places_are_tried_around_and_calls_learn_from_each_other() -> None:
    search = LeaderSearch(("10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"), is_plain=False)
    first, second, third = search.in_turn
    tried, others = set[Endpoint](), set[Endpoint]()
    assert search.failed(first, second.address, tried), "it named the leader"
    assert search.in_turn == (second, third, first)
    assert search.failed(first, "", others), "another call knows a better one"
    assert search.present == second
    assert search.failed(second, "", tried)
    assert search.present == third
    assert not search.failed(second, "", {third}), "the better one has failed, too"
    assert not search.failed(third, "", tried)
    assert search.present == first, "after the last comes the first"
    assert search.failed(first, "", {third})
    assert not search.failed(second, "", {first, third})
    assert search.present == third, "after the second comes the third"
    assert not search.is_stale, "addresses stay what they are"


def test_a_leader_beside_the_given_addresses_is_tried_first() -> None:
    alone = LeaderSearch(("10.0.0.1:1",), is_plain=False)
    assert not alone.are_several
    assert alone.failed(alone.present, "10.0.0.3:1", set())
    assert alone.are_several
    search = LeaderSearch(("10.0.0.1:1", "10.0.0.2:1"), is_plain=False)
    assert search.are_several
    first, second = search.in_turn
    assert search.failed(first, "10.0.0.3:1", set())
    outside = search.present
    assert search.in_turn == (Endpoint("10.0.0.3:1"), first, second)
    assert not search.failed(outside, outside.address, {first, second}), "it named itself"
    assert search.in_turn == (first, second)


def test_a_leader_that_is_known_has_the_name_of_its_certificate_and_a_refresh_stays_with_it() -> None:
    asked = list[Sequence[str]]()

    def resolve(addresses: Sequence[str]) -> tuple[Endpoint, ...]:
        asked.append(addresses)
        return tuple(Endpoint(f"10.0.0.{number}:1", "planners.example") for number in (1, 2))

    search = LeaderSearch(("planners.example:1",), is_plain=True, resolve=resolve)
    first, second = search.in_turn
    assert search.failed(first, second.address, set())
    assert search.present == Endpoint("10.0.0.2:1", "planners.example")
    search.refresh()
    assert len(asked) == 1, "not all have failed"
    assert not search.failed(first, first.address, {second})
    assert not search.failed(second, "", {first})
    assert search.failed(first, second.address, set())
    assert search.is_stale
    search.refresh()
    assert len(asked) == 2
    assert not search.is_stale
    assert search.present == second
