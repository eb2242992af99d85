"""Engines started with fixed settings: no more requests at once, and no more KV blocks, than these allow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hetis.simulator.events import Events
from hetis.simulator.replica import ReplicaRun
from hetis.simulator.simulate import Builder, simulate
from hetis.simulator.values import RequestLog, Settings
from hetis.solver.engine_rules import EngineSettings
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from tests.simulator.small_plans import equal_requests, pipeline, plan_of, small_problem

AS_PLANNED = Settings(dispatch=False, redispatch=False)


def at(problem: PlacementProblem, **given: Any) -> PlacementProblem:
    return replace(problem, family=replace(problem.family, engine_settings=EngineSettings(**given)))


def built(plan: Plan, problem: PlacementProblem) -> ReplicaRun:
    log = RequestLog()
    (replica,) = Builder(plan, problem, log, Events(), AS_PLANNED).replicas()
    return replica


def test_every_copy_of_every_stage_has_the_blocks_that_are_set_and_no_more_than_fit() -> None:
    problem = small_problem()
    plan = plan_of(pipeline(problem, 3, 3, copies=(2, 1), pool=(2, 1)))
    free = built(plan, problem)
    assert [copy.room is None for copies in free.stages for copy in copies] == [True, True, False]
    fits = free.stages[1][0].room
    kept = built(plan, at(problem, kv_blocks=50))
    assert [copy.room and copy.room.total for copies in kept.stages for copy in copies] == [50, 50, 50]
    many = built(plan, at(problem, kv_blocks=10**6))
    assert many.stages[1][0].room.total == fits.total


@pytest.mark.parametrize("pool", [None, (1, 1)])
def test_fewer_blocks_hold_fewer_requests_at_once(pool: tuple[int, int] | None) -> None:
    problem = small_problem()
    plan = plan_of(pipeline(problem, 6, pool=pool, micro_batch=8))
    requests = equal_requests(40, prompt=32, output=16)
    free, few = (simulate(plan, posed, requests, AS_PLANNED) for posed in (problem, at(problem, kv_blocks=40)))
    assert all(len(run.finished_s) == 40 and (run.finished_s > 0).all() for run in (free, few))
    # A request ends with 12 blocks of 4 tokens: 3 of them at once instead of 16.
    assert few.finished_s.max() > 2 * free.finished_s.max()
    none = simulate(plan, at(problem, kv_blocks=7), requests, AS_PLANNED)
    assert none.rejected == 40


def test_prompts_count_among_the_requests_that_an_engine_runs() -> None:
    problem = small_problem()
    plan = plan_of(pipeline(problem, 6, micro_batch=4, in_flight=2))
    assert built(plan, problem).batching.ahead > 0
    assert built(plan, at(problem, max_num_seqs=8)).batching.ahead == 0
    assert built(plan, at(problem, max_num_seqs=100)).batching.ahead == built(plan, problem).batching.ahead


def test_blocks_stay_free_for_the_requests_that_have_room_and_not_for_every_seat() -> None:
    problem = small_problem(usable_bytes=12_500_000)
    plan = plan_of(pipeline(problem, 6, micro_batch=4, in_flight=1))
    crowd = plan_of(pipeline(problem, 6, micro_batch=120, in_flight=1))
    seats = at(problem, max_num_seqs=120)
    growing = built(crowd, seats).batching.growing
    assert growing is not None
    assert 1 <= growing < 120
    assert built(plan, seats).batching.growing == min(4, growing)
    assert built(crowd, problem).batching.growing is None
    requests = equal_requests(60, prompt=16, output=8)
    assert simulate(crowd, seats, requests, AS_PLANNED).finished_s.max() < (
        simulate(crowd, problem, requests, AS_PLANNED).finished_s.max()
    )
