"""The queue model of a plan, beside closed forms and the simulator."""

from __future__ import annotations

import math
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.report.explanation import render_explanation
from hetis.planner.report.figures import seconds
from hetis.planner.use_cases.queueing import (
    FASTER,
    EqualReplicas,
    Queueing,
    RequestQueue,
    queueing,
    request_queue,
    with_queueing,
)
from hetis.planner.use_cases.simulate import Question, answer, default_rate, with_more_seats
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.running import silent
from hetis.simulator.values import Settings
from hetis.solver.placement.explanation import explain_plan
from hetis.solver.plan import Objective, Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.planner.test_reports import text_of
from tests.solver.instances import SMALL_FAMILY, make_node, make_problem, make_profile, make_workload

NO_LIMITS = Objective(ttft_limit_s=None, tpot_limit_s=None)


def servers(seats: int, service_s: float, *, count: int = 1, cv2: float = 1.0, beside: int = 0) -> EqualReplicas:
    """Return replicas whose seats are independent servers, and whose prompts take no time."""
    in_flight = np.arange(1.0, seats + 1)
    rates = in_flight / service_s / FASTER
    return EqualReplicas(
        count=count, seats=seats, beside=beside, in_flight=in_flight, rates=rates, holding_cv2=cv2, lanes=1,
        prompt_s=0.0, prefill_s=0.0,
    )  # fmt: skip


def queue_of(*replicas: EqualReplicas) -> RequestQueue:
    return RequestQueue(replicas, computed_cv2=1.0)


def erlang_c(servers: int, load: float) -> float:
    """Return the probability of waiting in M/M/c."""
    full = load**servers / math.factorial(servers) * servers / (servers - load)
    return full / (sum(load**n / math.factorial(n) for n in range(servers)) + full)


@pytest.mark.parametrize(("seats", "load"), [(1, 0.5), (1, 0.9), (4, 2.0), (4, 3.6), (20, 19.0), (60, 30.0)])
def test_independent_servers_are_erlangs(seats: int, load: float) -> None:
    service_s = 2.0
    found = queue_of(servers(seats, service_s)).at(load / service_s)
    must_wait = erlang_c(seats, load)
    assert found.must_wait == pytest.approx(must_wait, rel=1e-9)
    p95_s = max(0.0, math.log(20 * must_wait)) * service_s / (seats - load)  # P(W > w) = C exp(-(c mu - lambda) w)
    assert found.seat_p95_s == pytest.approx(p95_s, rel=1e-9)
    assert found.seats == seats


def test_constant_times_in_a_seat_halve_the_wait_and_seats_that_prefill_count() -> None:
    varying, constant = (queue_of(servers(4, 1.0, cv2=cv2)).at(3.6).seat_p95_s for cv2 in (1.0, 0.0))
    assert constant == pytest.approx(varying / 2)
    beside = queue_of(servers(4, 1.0, beside=2)).at(3.6)
    assert beside.must_wait == pytest.approx(queue_of(servers(4, 1.0)).at(3.6).must_wait * 0.9**2, rel=0.1)


def test_more_states_than_are_told_apart_change_little() -> None:
    """A fleet of 300,000 seats is coarsened, which matters less than the errors that the benchmark states."""
    many = queue_of(servers(300, 100.0, count=1000))
    assert many.at(2990.0).seat_p95_s == 0.0
    assert many.at(2999.99).must_wait == pytest.approx(erlang_c_of_many(300_000, 299_999.0), rel=0.15)


def erlang_c_of_many(servers: int, load: float) -> float:
    """Return `erlang_c` from the recursion of Erlang B, for many servers."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = load * blocked / (n + load * blocked)
    return blocked / (1.0 - load / servers * (1.0 - blocked))


@given(
    seats=st.integers(1, 40),
    loads=st.lists(st.floats(0.01, 0.99), min_size=2, max_size=2).map(sorted),
    count=st.integers(2, 4),
)
def test_the_wait_grows_with_the_rate_and_shrinks_with_more_replicas(
    seats: int, loads: list[float], count: int
) -> None:
    one, several = queue_of(servers(seats, 1.0)), queue_of(servers(seats, 1.0, count=count))
    low, high = (one.at(load * seats) for load in loads)
    assert low.must_wait <= high.must_wait * (1 + 1e-9)
    assert low.seat_p95_s <= high.seat_p95_s * (1 + 1e-9)
    assert several.at(count * loads[1] * seats).seat_p95_s <= high.seat_p95_s * (1 + 1e-9), (
        "one queue wastes no free seat"
    )


def test_from_the_saturated_rate_on_requests_wait_without_end() -> None:
    queue = queue_of(servers(4, 1.0))
    assert queue.at(4.0).seat_p95_s == queue.at(5.0).seat_p95_s == math.inf
    assert queue.at(4.0).must_wait == 1.0


@pytest.mark.parametrize("ttft_s", [0.0, 0.5, 3.0])
def test_the_highest_rate_is_the_one_that_just_keeps_the_limit(ttft_s: float) -> None:
    queue = queue_of(servers(4, 1.0))
    rate = queue.highest_rate(3.9, ttft_s)
    assert queue.at(rate).ttft_p95_s <= ttft_s < queue.at(rate * 1.01).ttft_p95_s
    assert queue.highest_rate(0.1, ttft_s) == 0.1
    assert queue_of(replace(servers(4, 1.0), prefill_s=1.0)).highest_rate(3.9, 0.9) == 0.0


def test_a_slow_replica_with_many_lanes_is_no_help_to_a_fast_one_with_few() -> None:
    """The lanes of all replicas compute so many prompts per second, whatever their number."""
    fast = replace(servers(1000, 1.0), prompt_s=0.01)
    slow = replace(servers(8, 80.0), lanes=8, prompt_s=0.8)
    assert queue_of(fast).at(99.0).lane_p95_s > 0.2
    assert queue_of(fast, slow).at(109.5).lane_p95_s > 0.2, "saturated at 110 prompts/s"
    assert queue_of(fast, slow).at(110.0).lane_p95_s == math.inf


def test_prompts_wait_for_a_lane_as_for_a_server() -> None:
    """With one lane, Sakasegawa's probability of waiting is its utilisation, as in M/M/1."""
    queue = queue_of(replace(servers(1000, 1.0), prompt_s=0.5, prefill_s=2.0))
    found = queue.at(1.6)
    assert found.seat_p95_s == 0.0
    assert found.lane_p95_s == pytest.approx(0.5 / 0.2 * math.log(20 * 0.8))
    assert found.ttft_p95_s == pytest.approx(2.0 + found.lane_p95_s)
    shared = queue_of(replace(servers(1000, 1.0, count=4), prompt_s=0.5, prefill_s=2.0)).at(4 * 1.6)
    assert shared.lane_p95_s < found.lane_p95_s / 4, "a router finds the free one of four"
    assert queue.at(2.0).ttft_p95_s == math.inf


# --- plans


@pytest.fixture(scope="module")
def few_seats() -> tuple[Plan, PlacementProblem]:
    """A replica with four seats, and a TTFT limit that its planned TTFT keeps."""
    problem = make_problem(
        [make_node("a", "A")],
        profiles={"A": make_profile("A")},
        workload=make_workload((100, 20), (100, 60), (300, 40)),
        family=replace(SMALL_FAMILY, in_flight=(1,), micro_batches=(4,)),
        objective=NO_LIMITS,
    )
    ttft_s = solve_placement(problem).replicas[0].ttft_s
    problem = replace(problem, objective=replace(NO_LIMITS, ttft_limit_s=1.5 * ttft_s))
    return solve_placement(problem), problem


def test_a_plan_s_wait_is_that_of_the_simulator(few_seats: tuple[Plan, PlacementProblem]) -> None:
    plan, problem = few_seats
    for share in (0.8, 1.0):
        rate_rps = share * default_rate(plan, problem)
        load = Load(
            lengths=problem.workload,
            max_position=problem.model.max_position,
            arrivals=Arrivals.DRAWN,
            rate_rps=rate_rps,
        )
        question = Question(
            load=load,
            num_requests=6000,
            seeds=(0,),
            settings=Settings(dispatch=False, redispatch=False),
            limits=NO_LIMITS,
        )
        run = answer(plan, problem, question, processes=1, cancelled=threading.Event(), report=silent).runs[0]
        queue = request_queue(plan, problem)
        assert queue is not None
        assert queue.seats == 4
        assert 0.5 < queue.at(rate_rps).ttft_p95_s / run.ttft_s.p95 < 2.0, share
        assert plan.replicas[0].ttft_s < run.ttft_s.p95 / 2, "what the planned TTFT leaves out"


def test_a_plan_that_was_not_simulated_says_that_requests_wait_too_long(
    few_seats: tuple[Plan, PlacementProblem],
) -> None:
    plan, problem = few_seats
    (note,) = with_queueing(plan, problem).notes[len(plan.notes) :]
    assert note.startswith("not simulated: by a queue model of 4 seats, requests wait up to ")
    assert "(p95) for a seat at " in note
    assert "so that p95 TTFT is over its limit of " in note
    assert note.endswith("requests/s keep it")
    unlimited = replace(plan, objective=NO_LIMITS)
    assert with_queueing(unlimited, problem) == unlimited
    generous = replace(plan, objective=replace(plan.objective, ttft_limit_s=1e6))
    assert with_queueing(generous, problem) == generous


def test_more_seats_of_an_engine_shorten_the_wait(few_seats: tuple[Plan, PlacementProblem]) -> None:
    plan, problem = few_seats
    wait, shorter = queueing(plan, problem), queueing(with_more_seats(plan, problem, 4.0), problem)
    assert wait is not None
    assert shorter is not None
    assert shorter.seats == 16
    assert shorter.seat_p95_s < wait.seat_p95_s / 2


def test_explain_states_the_waits(few_seats: tuple[Plan, PlacementProblem]) -> None:
    plan, problem = few_seats
    waits = queueing(plan, problem)
    assert waits is not None
    explanation = explain_plan(plan, problem)

    def shown(waits: Queueing | None) -> str:
        return " ".join(text_of(render_explanation(plan, explanation, waits)).split())

    assert re.search(
        r"Queueing By a queue model, at 137\.0 requests/s \d+% of the requests find none of 4 seats", shown(waits)
    )
    assert f"p95 TTFT {seconds(waits.ttft_p95_s)}." in shown(waits)
    assert "requests queue up without end." in shown(replace(waits, ttft_p95_s=math.inf))
    assert "a request finds one of 4 seats free" in shown(replace(waits, must_wait=1e-6))
    assert "Queueing" not in shown(None)
