"""The choice of a replica for a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.simulator.replica import ReplicaRun
from hetis.simulator.routers import EndpointPicker, Nginx, RangeRouter, Router, Weighted
from hetis.simulator.values import Request, RequestLog, RouterName, Settings
from hetis.solver.plan import ClassShare, KvRoute, Plan
from hetis.solver.workload import LengthBin, RequestClass, Workload
from tests.simulator import small_plans


@dataclass(slots=True)
class Replica:
    """A replica as seen by routers. The test sets ``outstanding``, because no request ends here."""

    number: int
    rate: float
    decodes: bool
    outstanding: int = 0
    seats: int = 100
    tokens: int = 0

    def prompt_tokens_under_way(self) -> int:
        return self.tokens

    def unanswered(self) -> int:
        return self.outstanding


def plan_for(replicas: Sequence[Replica], routes: tuple[KvRoute, ...] = ()) -> Plan:
    """Return a plan in which each replica has its seats, one of them for what a micro-batch gets beyond its own."""
    problem = small_plans.small_problem()
    one = small_plans.pipeline(problem, problem.model.num_layers)
    plans = (replace(one, rate=each.rate, micro_batch=each.seats - 1, in_flight=1) for each in replicas)
    return small_plans.plan_of(*plans, routes=routes)


def nginx(replicas: Sequence[Replica], routes: tuple[KvRoute, ...] = (), *, fewest: bool = True) -> Nginx:
    return Nginx(0, plan_for(replicas, routes), cast(list[ReplicaRun], replicas), fewest=fewest)


def chosen(router: Router, replicas: Sequence[Replica], *, times: int) -> Counter[int]:
    """Return how often each replica is chosen; prefill replicas finish at once, others keep all their requests."""
    counts, takers = Counter[int](), cast(list[ReplicaRun], replicas)
    for _ in range(times):
        number = router(takers).number
        counts[number] += 1
        replicas[number].outstanding += replicas[number].decodes
    return counts


@pytest.mark.parametrize("name", ["nginx", "weighted"])
@given(rates=st.lists(st.floats(0.5, 50.0), min_size=2, max_size=6), data=st.data())
def test_prefill_replicas_get_their_planned_share_however_soon_they_are_done(
    name: str, rates: list[float], data: st.DataObject
) -> None:
    """Requests stay where they decode, so that a prefill replica always has the fewest waiting and running."""
    num_prefill = data.draw(st.integers(1, len(rates) - 1))
    replicas = [Replica(n, rate, decodes=n >= num_prefill, seats=2000) for n, rate in enumerate(rates)]
    counts = chosen(nginx(replicas) if name == "nginx" else Weighted(seed=0), replicas, times=1000)
    share = sum(rates[:num_prefill]) / sum(rates)
    assert sum(counts[n] for n in range(num_prefill)) == pytest.approx(1000 * share, abs=len(rates) + 1)


def test_no_request_goes_to_a_full_replica_while_another_has_a_free_seat() -> None:
    """By the planned rates alone, which hardly differ, 2 seats would be as full as 48."""
    fleet = [Replica(0, 1.0, decodes=True, seats=2), Replica(1, 1.1, decodes=True, seats=48)]
    router = nginx(fleet)
    assert chosen(router, fleet, times=50) == {0: 2, 1: 48}
    assert chosen(router, fleet, times=21) == {0: 10, 1: 11}  # all are full: turns count again


def test_what_pairs_replicas_is_full_with_all_that_these_hold() -> None:
    """Two prefill replicas share one that decodes; nginx counts a request until it is answered."""
    fleet = [Replica(0, 1.0, False, seats=2), Replica(1, 3.0, False, seats=2), Replica(2, 4.0, True, seats=9)]
    fleet.append(Replica(3, 4.0, True, seats=50))
    router = nginx(fleet, tuple(KvRoute(prefill=each, decode=2, rate=each + 1.0) for each in (0, 1)))
    takers = [fleet[0], fleet[1], fleet[3]]
    assert Counter(router(cast(list[ReplicaRun], takers)).number for _ in range(80)) == {0: 10, 1: 30, 3: 40}
    fleet[0].outstanding, fleet[2].outstanding = 2, 11
    assert {router(cast(list[ReplicaRun], takers)).number for _ in range(9)} == {3}


def test_a_prompt_goes_where_the_fewest_are_by_weight() -> None:
    fleet = [Replica(0, 1.0, False), Replica(1, 3.0, False), Replica(2, 4.0, True)]
    routes = tuple(KvRoute(prefill=each, decode=2, rate=each * 2 + 1.0) for each in (0, 1))
    router, turns = nginx(fleet, routes), nginx(fleet, routes, fewest=False)
    takers = cast(list[ReplicaRun], fleet[:2])

    def next_ones(*held: int) -> Counter[int]:
        fleet[0].outstanding, fleet[1].outstanding = held
        return Counter(router(takers).number for _ in range(8))

    assert next_ones(0, 0) == next_ones(2, 6) == {0: 2, 1: 6}, "turns by weight"
    assert next_ones(0, 1) == next_ones(1, 4) == {0: 8}
    assert next_ones(1, 2) == next_ones(2, 5) == {1: 8}
    assert Counter(turns(takers).number for _ in range(8)) == {0: 2, 1: 6}, "SGLang's router does not count"


def test_llm_d_fills_seats_evenly_and_keeps_prompts_apart() -> None:
    fleet = [Replica(0, 3.0, decodes=True, seats=31), Replica(1, 1.0, decodes=True, seats=11)]
    router = EndpointPicker(0, plan_for(fleet))
    counts = chosen(router, fleet, times=40)
    assert counts[0] == pytest.approx(30, abs=1)
    fleet[0].tokens = 2048  # as much as all requests in flight, twice
    assert chosen(router, fleet, times=5) == {1: 5}


def test_llm_d_draws_a_pool_and_knows_no_requests_at_prefill() -> None:
    fleet = [Replica(0, 4.0, False), Replica(1, 2.0, False), Replica(2, 4.0, True), Replica(3, 6.0, True)]
    routes = tuple(KvRoute(prefill=each, decode=2, rate=1.0) for each in (0, 1))
    router, takers = EndpointPicker(0, plan_for(fleet, routes)), cast(list[ReplicaRun], [*fleet[:2], fleet[3]])
    fleet[0].outstanding = 9
    counts = Counter(router(takers).number for _ in range(400))
    assert counts.keys() == {0, 3}
    assert counts[0] == pytest.approx(200, abs=40)
    fleet[0].tokens = 600
    assert {router(takers).number for _ in range(50)} == {1, 3}


CLASSES = (RequestClass(name="short", max_prompt_tokens=100), RequestClass(name="long"))


class OfClasses:
    """A router of classes before replicas of some rates and seats, to which requests are assigned as it says."""

    def __init__(self, serving: Sequence[tuple[tuple[str, ...], float, int]], *, router: RouterName = "nginx") -> None:
        shares = (ClassShare(name="short", share=0.75, max_prompt_tokens=100), ClassShare(name="long", share=0.25))
        self.replicas = [Replica(number, rate, True, seats=most) for number, (_, rate, most) in enumerate(serving)]
        plan = replace(plan_for(self.replicas), classes=shares)
        replicas = zip(plan.replicas, serving, strict=True)
        plan = replace(plan, replicas=tuple(replace(one, classes=classes) for one, (classes, *_) in replicas))
        for one, (classes, rate, _) in zip(self.replicas, serving, strict=True):
            one.rate = rate / plan.pool_share(classes)
        bins = (LengthBin(prompt_tokens=1.0, output_tokens=1.0, weight=1.0),)
        workload, self.log = Workload(name="w", bins=bins, classes=CLASSES), RequestLog()
        self.fleet = cast(list[ReplicaRun], self.replicas)
        self.router = RangeRouter(plan, workload, Settings(router=router), self.fleet, self.log)

    def send(self, prompt_tokens: int) -> int:
        """Return the replica of a new request."""
        request = Request(id=0, arrival_s=0.0, prompt_tokens=prompt_tokens, output_tokens=1)
        number = self.log.arrive(request, 0.0)
        one = self.router.choose(self.router.serving(self.fleet, number), number)
        assert one is not None
        self.log.replica[number] = one.number
        self.replicas[one.number].outstanding += 1
        return one.number

    def finish(self, request: int) -> None:
        self.log.finished_s[request] = 1.0
        self.replicas[self.log.replica[request]].outstanding -= 1


def test_requests_of_a_class_go_to_the_replicas_for_it_in_their_shares_while_these_have_seats_for_it() -> None:
    """6/s of short requests are those of 8/s in all, as many as the 8/s of all; of 8 seats 6 and 2 are theirs."""
    fleet = OfClasses([((), 8.0, 8), (("short",), 6.0, 9), (("long",), 4.0, 4)])
    assert Counter(fleet.send(100) for _ in range(12)) == {0: 6, 1: 6}
    assert Counter(fleet.send(101) for _ in range(6)) == {0: 2, 2: 4}, "2 seats are left, and 16 to 8 is the share"
    assert [fleet.send(100) for _ in range(3)] == [1, 1, 1], "6 requests hold all that is for short ones"
    fleet.finish(next(n for n in range(12) if fleet.log.replica[n] == 0))
    assert fleet.send(50) == 0
    assert {fleet.send(50) for _ in range(8)} == {0, 1}, "all are full: turns count again"
    assert fleet.router.choose([], 0) is None


def test_llm_d_picks_among_the_replicas_for_a_class() -> None:
    fleet = OfClasses([((), 8.0, 31), (("short",), 6.0, 31), (("long",), 4.0, 31)], router="llm-d")
    assert Counter(fleet.send(100) for _ in range(20)) == {0: 10, 1: 10}
    assert Counter(fleet.send(101) for _ in range(12)) == {0: 1, 2: 11}, "other requests count, too"
