"""Background transfers over a link wait for those already in progress."""

from __future__ import annotations

from hetis.simulator.events import Events, FleetLinks, transfer
from hetis.simulator.fleet import Faults, KvTransfers, SimulatedFleet
from hetis.simulator.routers import Weighted
from hetis.simulator.simulate import Builder
from hetis.simulator.values import RequestLog, Settings
from hetis.solver.plan import KvRoute, Plan, Role
from hetis.solver.problem import PlacementProblem
from tests.simulator.small_plans import equal_requests, pipeline, plan_of, small_problem, with_role
from tests.solver.instances import make_model, make_workload

BUSY_S = 1.2


def test_a_transfer_starts_when_both_ends_are_free_and_directions_are_apart() -> None:
    links = FleetLinks()
    assert transfer(1.0, 2.0, links.leaving("a"), links.coming("b")) == 3.0
    assert transfer(1.0, 2.0, links.leaving("c"), links.coming("b")) == 5.0  # after the first transfer
    assert transfer(1.0, 2.0, links.leaving("b"), links.coming("a")) == 3.0  # in the other direction
    assert transfer(1.0, 1.0, links.leaving("a"), links.coming("c")) == 4.0
    assert transfer(0.0, 1.0, links.between("x", "y")) == transfer(0.0, 1.0, links.between("y", "x")) == 1.0


def fleet_with_a_busy_link(
    plan: Plan, problem: PlacementProblem, device: str
) -> tuple[SimulatedFleet, RequestLog, Events]:
    """Return the replicas of a plan, while another transfer to the device takes `BUSY_S`."""
    log, events = RequestLog(), Events()
    builder = Builder(plan, problem, log, events, Settings(theta=0.05))
    fleet = SimulatedFleet(builder.replicas(), log, events, Weighted(0))
    if plan.kv_routes:
        fleet.transfers = KvTransfers(
            plan, problem, builder.fleet, fleet.replicas, log, events, fleet.route, builder.links
        )
    transfer(0.0, BUSY_S, builder.links.coming(device))
    return fleet, log, events


def test_kv_waits_for_the_links_of_ranks_and_of_workers() -> None:
    problem = small_problem(model=make_model(kv_heads=4))
    prefill = with_role(pipeline(problem, 6), Role.PREFILL)
    decode = with_role(pipeline(problem, 6, first=1, pool=(1, 1)), Role.DECODE)
    plan = plan_of(prefill, decode, routes=(KvRoute(prefill=0, decode=1, rate=1.0),))
    for device in ("big-1/0", "small-1/0"):
        fleet, log, events = fleet_with_a_busy_link(plan, problem, device)
        fleet.serve(iter(equal_requests(4, prompt=20, output=5)))
        events.run()
        assert max(log.admitted_s) < BUSY_S <= min(log.first_token_s) < min(log.finished_s)
    fleet, log, events = fleet_with_a_busy_link(plan, problem, "big-0/0")  # KV leaves it, in the other direction
    fleet.serve(iter(equal_requests(4, prompt=20, output=5)))
    events.run()
    assert max(log.finished_s) < BUSY_S


def test_kv_of_which_nothing_comes_to_a_rank_does_not_wait_for_its_link() -> None:
    problem = small_problem(model=make_model(kv_heads=4))
    prefill = with_role(pipeline(problem, 6), Role.PREFILL)
    decode = with_role(pipeline(problem, 6, first=1, pool=(1, 4)), Role.DECODE)  # the worker holds all head groups
    plan = plan_of(prefill, decode, routes=(KvRoute(prefill=0, decode=1, rate=1.0),))
    fleet, log, events = fleet_with_a_busy_link(plan, problem, "big-1/0")
    fleet.serve(iter(equal_requests(4, prompt=20, output=5)))
    events.run()
    assert max(log.finished_s) < BUSY_S


def test_head_groups_that_move_wait_for_the_links_of_workers() -> None:
    problem = small_problem(model=make_model(kv_heads=4), workload=make_workload((700, 1200)), usable_bytes=120_000_000)
    plan = plan_of(pipeline(problem, 6, micro_batch=8, in_flight=1, pool=(2, 1)))
    committed_s = []
    for device in ("small-0/0", "big-7/0"):
        fleet, log, events = fleet_with_a_busy_link(plan, problem, device)
        faults = Faults(fleet)
        events.at(0.5, faults.change, "small-0/0", False)
        events.at(0.8, faults.change, "small-0/0", True)
        fleet.serve(iter(equal_requests(8, prompt=700, output=1200)))
        while not log.migrations:
            events.run(events.now_s + 0.05)
        committed_s.append(events.now_s)
    assert committed_s[1] < BUSY_S <= committed_s[0]
