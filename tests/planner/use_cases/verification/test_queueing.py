"""The queue model of a plan, beside closed forms and the simulator."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.report.explanation import render_explanation
from hetis.planner.report.figures import seconds
from hetis.planner.use_cases.simulation.simulate import Question, answer, default_rate
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.running import never, silent
from hetis.simulator.values import Settings
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.check.waiting import queueing, request_queue
from hetis.solver.engine_rules import EngineSettings
from hetis.solver.placement.explanation import explain_plan
from hetis.solver.placement.families import STRATEGIES, run_by
from hetis.solver.plan import Objective, Plan, ReplicaPlan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.queueing import EqualPrefills, EqualReplicas, Queueing, RequestQueue, SharedQueue
from tests.planner.report.test_reports import text_of
from tests.simulator.more_seats import with_more_seats
from tests.solver.instances import ENGINE, SMALL_FAMILY, make_node, make_problem, make_profile, make_workload

NO_LIMITS = Objective(ttft_limit_s=None, tpot_limit_s=None)


def servers(seats: int, service_s: float, *, count: int = 1, cv2: float = 1.0, beside: int = 0) -> EqualReplicas:
    """Return replicas whose seats are independent servers."""
    in_flight = np.arange(1.0, seats + 1)
    rates = in_flight / service_s
    return EqualReplicas(count=count, seats=seats, beside=beside, in_flight=in_flight, rates=rates, holding_cv2=cv2)


def prefills(lanes: int = 1, *, prompt_s: float = 0.0, alone_s: float = 0.0, rate: float = 1.0) -> EqualPrefills:
    """Return lanes that compute prompts of one length, for twice as long if they are crowded."""
    return EqualPrefills(
        lanes=lanes, occupied_s=np.array([prompt_s]), held=4.0, rate_rps=rate, alone_s=np.array([alone_s]),
        crowded_s=np.array([2 * alone_s]),
    )  # fmt: skip


def shared_queue(*parts: EqualReplicas | EqualPrefills, arrival_cv2: float = 1.0) -> SharedQueue:
    """Return the queue of prompts of one length."""
    seats = [part for part in parts if isinstance(part, EqualReplicas)]
    lanes = [part for part in parts if isinstance(part, EqualPrefills)] or [prefills()]
    return SharedQueue(seats, lanes, np.ones(1), 0.0, arrival_cv2)


def queue_of(*parts: EqualReplicas | EqualPrefills) -> RequestQueue:
    """Return the queue of replicas whose prompts take no time, unless some parts compute them."""
    return RequestQueue(shared_queue(*parts))


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
    assert found.seat_p95_s == pytest.approx(p95_s, rel=1e-6)
    assert found.ttft_p95_s == pytest.approx(p95_s, rel=1e-6)
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
    assert queue_of(servers(4, 1.0), prefills(alone_s=1.0)).highest_rate(3.9, 0.9) == 0.0


def test_a_slow_replica_with_many_lanes_is_no_help_to_a_fast_one_with_few() -> None:
    """The lanes of all replicas compute so many prompts per second, whatever their number."""
    fast, quick = servers(1000, 1.0), prefills(prompt_s=0.01)
    slow, long = servers(8, 80.0), prefills(8, prompt_s=0.8)
    assert queue_of(fast, quick).at(99.0).lane_p95_s > 0.2
    assert queue_of(fast, slow, quick, long).at(109.5).lane_p95_s > 0.2, "saturated at 110 prompts/s"
    assert queue_of(fast, slow, quick, long).at(110.0).lane_p95_s == math.inf


def mean_in_lane(queue: SharedQueue, rate_rps: float) -> float:
    """Return the mean wait for a lane: the integral of the probability of longer waits."""
    late, times = queue.late_in_lane(rate_rps), np.linspace(0.0, 40.0, 20_001)
    return float(np.trapezoid([late(float(time_s)) for time_s in times], times))


@pytest.mark.parametrize("taken", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.0, 0.9])
def test_one_lane_makes_prompts_wait_as_pollaczek_and_khinchine_say(taken: float, spread: float) -> None:
    occupied_s, weights = np.array([1.0 - spread, 1.0 + spread]), np.array([0.5, 0.5])
    lane = EqualPrefills(
        lanes=1, occupied_s=occupied_s, held=1.0, rate_rps=1.0, alone_s=np.zeros(2), crowded_s=np.zeros(2)
    )
    queue = SharedQueue([servers(1000, 1.0)], [lane], weights, spread**2)
    assert mean_in_lane(queue, taken) == pytest.approx(taken / (1 - taken) * (1 + spread**2) / 2, rel=0.02)
    rest = queue.late_in_lane(1e-6)
    for time_s in (0.0, 0.5, 1.0, 1.5):  # hardly anyone waits behind another
        left = float(weights @ np.maximum(0.0, occupied_s - time_s))
        assert rest(time_s) / 1e-6 == pytest.approx(left, abs=0.05)


def test_prompts_wait_for_a_lane() -> None:
    queue = queue_of(servers(1000, 1.0), prefills(prompt_s=0.5, alone_s=2.0))
    found = queue.at(1.6)
    assert found.seat_p95_s == 0.0
    prompt_s = 0.8 * 4.0 + 0.2 * 2.0  # the lane is taken, and chunks are full, for 80% of the time
    assert found.ttft_p95_s == pytest.approx(prompt_s + found.lane_p95_s)
    assert queue.at(2.0).ttft_p95_s == math.inf


def test_several_lanes_wait_less_and_more_if_requests_come_in_bursts() -> None:
    """In turn, prompts come to each lane more evenly; and what queues up for one of many lanes goes to another."""
    parts = servers(1000, 1.0, count=4), prefills(4, prompt_s=0.5, alone_s=2.0)
    one, four, many = (
        mean_in_lane(shared_queue(servers(9999, 1.0), prefills(n, prompt_s=0.5)), 2 * n * 0.95) for n in (1, 4, 64)
    )
    assert many < four < one / 2
    calm, bursts = (RequestQueue(shared_queue(*parts, arrival_cv2=cv2)).at(7.0).lane_p95_s for cv2 in (1.0, 9.0))
    assert bursts > 1.5 * calm


def test_a_request_that_has_no_seat_may_have_no_lane_either() -> None:
    """Both waits count as if they were independent, so that one of them is longer more often than each."""
    queue = shared_queue(servers(4, 1.0), prefills(prompt_s=0.25))
    found = RequestQueue(queue).at(3.6)
    longest = max(found.seat_p95_s, found.lane_p95_s)
    assert longest < found.ttft_p95_s < found.seat_p95_s + found.lane_p95_s
    by_seat, by_lane = queue.for_seats(3.6).is_longer(found.ttft_p95_s), queue.late_in_lane(3.6)(found.ttft_p95_s)
    assert by_seat + by_lane - by_seat * by_lane == pytest.approx(0.05, rel=1e-4)


def test_few_requests_on_a_slow_replica_do_not_make_its_prompts_the_p95() -> None:
    fast, slow = prefills(8, alone_s=1.0, rate=99.0), prefills(1, alone_s=10.0, rate=1.0)
    assert queue_of(servers(1000, 1.0), fast, slow).at(1.0).ttft_p95_s == pytest.approx(1.0)
    often = replace(slow, rate_rps=9.0)
    assert queue_of(servers(1000, 1.0), fast, often).at(1.0).ttft_p95_s == pytest.approx(10.0)


def test_two_queues_of_a_plan_share_its_requests_by_their_rates() -> None:
    calm = shared_queue(servers(30, 1.0), prefills(rate=9.0))
    busy = shared_queue(servers(1, 1.0), prefills(rate=1.0))
    found = RequestQueue(calm, busy).at(9.0)
    assert found.seats == 31
    assert found.must_wait == pytest.approx(0.1 * 0.9, abs=1e-3), "of M/M/1 at 90%, a tenth of the requests"
    # 5% of all requests are half of those of the busy queue.
    assert found.seat_p95_s == pytest.approx(math.log(0.9 / 0.5) / 0.1, rel=1e-3)
    assert RequestQueue(calm, busy).at(10.0).seat_p95_s == math.inf


# --- plans


ONE_STAGE = run_by(replace(SMALL_FAMILY, micro_batches=(4,), engine=None), replace(ENGINE, max_stages=1))


@pytest.fixture(scope="module")
def few_seats() -> tuple[Plan, PlacementProblem]:
    """A replica with four seats, and a TTFT limit that its planned TTFT keeps."""
    problem = make_problem(
        [make_node("a", "A")],
        profiles={"A": make_profile("A")},
        workload=make_workload((100, 20), (100, 60), (300, 40)),
        family=ONE_STAGE,
        objective=NO_LIMITS,
    )
    ttft_s = solve_placement(problem).replicas[0].ttft_s
    problem = replace(problem, objective=replace(NO_LIMITS, ttft_limit_s=1.5 * ttft_s))
    return solve_placement(problem), problem


@pytest.fixture(scope="module")
def apart() -> tuple[Plan, PlacementProblem]:
    """A replica that prefills, and two that decode."""
    problem = make_problem(
        [make_node("a", "A"), make_node("b", "B", gpus=2)],
        profiles={"A": make_profile("A", flops=4e12), "B": make_profile("B", flops=5e11)},
        workload=make_workload((100, 20), (100, 60), (300, 40)),
        family=STRATEGIES["hexgen2"].restrict(ONE_STAGE),
        objective=NO_LIMITS,
    )
    plan = solve_placement(problem, strategy="hexgen2")
    assert {one.role for one in plan.replicas} == {Role.PREFILL, Role.DECODE}
    return plan, problem


def simulated_p95_s(plan: Plan, problem: PlacementProblem, rate_rps: float) -> float:
    load = Load(
        lengths=problem.workload, max_position=problem.model.max_position, arrivals=Arrivals.DRAWN, rate_rps=rate_rps
    )
    settings = Settings(dispatch=False, redispatch=False)
    question = Question(load=load, num_requests=6000, seeds=(0,), settings=settings, limits=NO_LIMITS)
    run = answer(plan, problem, question, processes=1, is_cancelled=never, report=silent).runs[0]
    return run.ttft_s.p95


@pytest.mark.parametrize("made", ["few_seats", "apart"])
@pytest.mark.parametrize(("share", "factor"), [(0.6, 1.5), (0.8, 1.5), (1.0, 2.0)])
def test_a_plan_s_ttft_is_that_of_the_simulator(
    made: str, share: float, factor: float, request: pytest.FixtureRequest
) -> None:
    plan, problem = request.getfixturevalue(made)
    rate_rps = share * default_rate(plan, problem)
    queue = request_queue(plan, problem)
    assert 1 / factor < queue.ttft_p95_s(rate_rps) / simulated_p95_s(plan, problem, rate_rps) < factor


def rates_of(one: ReplicaPlan, problem: PlacementProblem) -> list[float]:
    """Return the requests/s that leave a replica with 1, 2, ... decoding requests, up to its micro-batch."""
    shape, derivation = replica_shape(one, problem, Fleet.of(problem.cluster)), Rederivation(problem)
    return [derivation.of(replace(shape, micro_batch=n)).rate for n in range(1, one.micro_batch + 1)]


def always_taken(
    rate_rps: float, leaving_rps: Sequence[float], weights: Mapping[int, float] = MappingProxyType({})
) -> float:
    """Return the probability of the last state of a birth-and-death process, which stands for endless further ones.

    ``weights`` are exponents of the ratio between some states and those before them.
    """
    shares = [1.0]
    for state, leaving in enumerate(leaving_rps, 1):
        shares.append(shares[-1] * (rate_rps / leaving) ** weights.get(state, 1.0))
    full = shares.pop() / (1 - rate_rps / leaving_rps[-1])
    return full / (sum(shares) + full)


def varies(holding_s: Sequence[float]) -> float:
    """Return Allen and Cunneen's factor for these times in a seat."""
    return float(1 + np.var(holding_s) / np.mean(holding_s) ** 2) / 2


def test_prompts_take_a_place_beside_the_seats_of_a_unified_replica(few_seats: tuple[Plan, PlacementProblem]) -> None:
    """Chunks of a prompt take 2.6 of the ten iterations that a request decodes meanwhile: one place is enough."""
    plan, problem = few_seats
    (one,) = plan.replicas
    rates, rate_rps = rates_of(one, problem), default_rate(plan, problem)
    chunks = [tokens / one.chunk_tokens for tokens in (100, 100, 300)]
    factor = varies([20 + chunks[0], 60 + chunks[1], 40 + chunks[2]])
    for settings, leaving in ((EngineSettings(), [*rates, rates[-1]]), (EngineSettings(max_num_seqs=4), rates)):
        found = queueing(plan, replace(problem, family=problem.family.at(settings)))
        must_wait = always_taken(rate_rps, leaving)
        assert found.must_wait == pytest.approx(must_wait, rel=1e-6)
        assert found.seat_p95_s == pytest.approx(math.log(20 * must_wait) * factor / (rates[-1] - rate_rps), rel=1e-5)


def test_a_seat_of_a_decode_replica_is_held_from_the_prompt_on(apart: tuple[Plan, PlacementProblem]) -> None:
    """Each of two gets half of the prompts of one, and so a seat for one under way beside four that decode."""
    plan, problem = apart
    prefill, one = (next(each for each in plan.replicas if each.role is role) for role in (Role.PREFILL, Role.DECODE))
    derived = Rederivation(problem).of(replica_shape(prefill, problem, Fleet.of(problem.cluster)))
    chunks = [tokens / prefill.chunk_tokens + 1 for tokens in (100, 100, 300)]  # full of other prompts, too
    under_way_s = [number * derived.chunk_s + derived.landing_s for number in chunks]
    rates = np.array(rates_of(one, problem))
    in_flight = np.array([*(np.arange(1, 5) + rates * np.mean(under_way_s)), 5.0])
    held_s = in_flight / np.array([*rates, rates[-1]])
    leaving = [2 * taken / np.interp(taken, in_flight, held_s) for taken in np.arange(1, 11) / 2]
    iteration_s = 1 / rates[-1] / 10
    factor = varies([tokens * iteration_s + wait_s for tokens, wait_s in zip((20, 60, 40), under_way_s, strict=True)])
    found = queueing(plan, problem)
    assert found.seats == 10
    must_wait = always_taken(found.rate_rps, leaving, {9: 1 / factor})  # four decode in each, and one waits to
    assert found.must_wait == pytest.approx(must_wait, rel=1e-6)
    wait_s = math.log(20 * must_wait) * factor / (2 * rates[-1] - found.rate_rps)
    assert found.seat_p95_s == pytest.approx(wait_s, rel=1e-5)


def test_a_planned_ttft_leaves_out_the_wait_for_a_seat(few_seats: tuple[Plan, PlacementProblem]) -> None:
    plan, problem = few_seats
    waits = queueing(plan, problem)
    assert waits.seats == 4
    assert plan.replicas[0].ttft_s < waits.ttft_p95_s / 2


def test_seats_of_a_decode_replica_are_taken_while_prompts_are_computed(apart: tuple[Plan, PlacementProblem]) -> None:
    plan, problem = apart
    queue = request_queue(plan, problem)
    decoding = sum(one.planned_seats for one in plan.replicas if one.role is Role.DECODE)
    assert queue.seats >= decoding + sum(one.in_flight for one in plan.replicas if one.role is Role.DECODE)


def test_engines_with_a_given_number_of_seats_compute_prompts_in_them(few_seats: tuple[Plan, PlacementProblem]) -> None:
    plan, problem = few_seats
    limited = replace(problem, family=problem.family.at(EngineSettings(max_num_seqs=4)))
    waits, longer = queueing(plan, problem), queueing(plan, limited)
    assert longer.must_wait > waits.must_wait
    rate_rps = 0.6 * default_rate(plan, limited)
    queue = request_queue(plan, limited)
    assert 1 / 1.4 < queue.ttft_p95_s(rate_rps) / simulated_p95_s(plan, limited, rate_rps) < 1.4


def test_replicas_and_routes_without_a_rate_have_no_queue(apart: tuple[Plan, PlacementProblem]) -> None:
    """`explain` shows plans that fail their check, too."""
    plan, problem = apart
    idle = tuple(replace(one, rate=0.0) for one in plan.kv_routes)
    assert queueing(replace(plan, kv_routes=idle), problem) is None
    stopped = tuple(replace(one, rate=0.0) if one.role is Role.DECODE else one for one in plan.replicas)
    assert queueing(replace(plan, replicas=stopped), problem) is None
    assert queueing(replace(plan, replicas=(), kv_routes=()), problem) is None
    assert queueing(replace(plan, kv_routes=(*plan.kv_routes, idle[0])), problem) == queueing(plan, problem)


def test_more_seats_of_an_engine_shorten_the_wait(few_seats: tuple[Plan, PlacementProblem]) -> None:
    plan, problem = few_seats
    wait, shorter = queueing(plan, problem), queueing(with_more_seats(plan, problem, 4.0), problem)
    assert shorter.seats == 16
    assert shorter.seat_p95_s < wait.seat_p95_s / 2


def test_explain_states_the_waits(few_seats: tuple[Plan, PlacementProblem]) -> None:
    plan, problem = few_seats
    waits = queueing(plan, problem)
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
