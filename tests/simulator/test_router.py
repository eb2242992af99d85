"""The choice of a replica for a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.simulator.replica import ReplicaRun
from hetis.simulator.routers import EndpointPicker, Nginx, RangeRouter, Router, Weighted
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


@dataclass(slots=True)
class Queued(Replica):
    """A replica whose requests wait in a queue."""

    queue: list[int] = field(default_factory=list)


def test_requests_of_a_class_go_to_its_pools_in_their_shares_and_overflow() -> None:
    """With shares of 80% and 20%, 8/s of short requests and 10/s of all give the short ones 10 to 10."""
    problem = small_plans.small_problem()
    one = small_plans.pipeline(problem, problem.model.num_layers)
    serving = [((), 10.0), (("short",), 8.0), (("long",), 1.0)]
    plan = replace(
        small_plans.plan_of(*(replace(one, classes=classes, rate=rate) for classes, rate in serving)),
        classes=(ClassShare(name="short", share=0.8, max_prompt_tokens=100), ClassShare(name="long", share=0.2)),
    )
    bins = (LengthBin(prompt_tokens=1.0, output_tokens=1.0, weight=1.0),)
    classes = (RequestClass(name="short", max_prompt_tokens=100), RequestClass(name="long"))
    router = RangeRouter(plan, Workload(name="w", bins=bins, classes=classes), 0, lambda: Weighted(0))
    replicas = [Queued(number, rate, decodes=True) for number, (_, rate) in enumerate(serving)]
    fleet = cast(list[ReplicaRun], replicas)

    def choose(prompt_tokens: int, times: int) -> Counter[int]:
        served = router.serving(fleet, prompt_tokens)
        return Counter(cast(ReplicaRun, router.choose(served, prompt_tokens)).number for _ in range(times))

    assert choose(100, times=100) == {0: 50, 1: 50}
    assert choose(101, times=90) == {0: 60, 2: 30}  # 10/s of all, 5/s of those for which the long pool has room
    replicas[1].queue.append(7)
    assert choose(50, times=20) == {0: 20}  # requests wait in the pool of short ones
    replicas[0].queue.append(8)
    assert set(choose(50, times=20)) == {0, 1}  # and everywhere: shares count again
    assert router.choose([], 50) is None
