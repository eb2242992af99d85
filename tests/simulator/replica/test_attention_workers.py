"""Stages with attention workers: dispatch and re-dispatch by the solver, the plan's split, shared cards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.simulator.attention_workers import Decoding, Migration, PoolCopy
from hetis.simulator.events import Events
from hetis.simulator.fleet import SimulatedFleet
from hetis.simulator.routers import Weighted
from hetis.simulator.simulate import Builder, simulate
from hetis.simulator.values import Fault, Request, RequestLog, Settings
from hetis.solver.plan import AttentionWorkerPool, Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.redispatch.redispatch_problem import Move, MoveReason
from tests.simulator.small_plans import equal_requests, pipeline, plan_of, small_problem
from tests.solver.instances import make_model, make_profile, make_workload

AS_PLANNED = Settings(dispatch=False, redispatch=False)


def pool_run(plan: Plan, problem: PlacementProblem, requests: list[Request], chosen: Settings) -> list[PoolCopy]:
    """Run for half a second and return the stage copies with pools at that time, moves in progress included."""
    log, events = RequestLog(), Events()
    fleet = SimulatedFleet(Builder(plan, problem, log, events, chosen).replicas(), log, events, Weighted(0))
    fleet.serve(iter(requests))
    events.run(0.5)
    return [c.pool for one in fleet.replicas for copies in one.stages for c in copies if c.pool is not None]


@pytest.mark.parametrize(("seats", "kept"), [(1, 96), (4, 74), (400, 51)])
def test_a_request_leaves_room_for_what_requests_hold_of_their_outputs(seats: int, kept: int) -> None:
    """Requests with outputs of 96 tokens hold 48 on average, plus 1.645 deviations over n seats: 31 / sqrt(n)."""
    problem = small_problem(model=make_model(kv_heads=4), workload=make_workload((32, 96), (4, 96)), usable_bytes=10**9)
    plan = plan_of(pipeline(problem, 6, micro_batch=seats, in_flight=1, pool=(2, 1)))
    (replica,) = Builder(plan, problem, RequestLog(), Events(), AS_PLANNED).replicas()
    pool = replica.stages[0][0].pool
    for request in range(2):  # alone, a request needs no room but its own
        assert pool.place(replica.batches[0].pools[0][1], request, 32)
    assert [pool.state.remaining_tokens(str(request)) for request in range(2)] == [0, kept]


@given(
    st.sampled_from([AS_PLANNED, Settings(redispatch=False), Settings(theta=0.0)]),
    st.lists(st.tuples(st.integers(1, 80), st.integers(1, 60)), min_size=1, max_size=20),
    st.sampled_from([11_500_000, 60_000_000]),
    st.integers(1, 3),
)
@settings(max_examples=25)
def test_everything_is_served_with_head_groups_on_workers(
    chosen: Settings, lengths: list[tuple[int, int]], usable_bytes: int, in_flight: int
) -> None:
    problem = small_problem(model=make_model(kv_heads=4), usable_bytes=usable_bytes)
    plan = plan_of(pipeline(problem, 6, micro_batch=5, in_flight=in_flight, pool=(2, 1)))
    requests = [
        Request(id=n, arrival_s=n * 1e-3, prompt_tokens=prompt, output_tokens=output)
        for n, (prompt, output) in enumerate(lengths)
    ]
    run = simulate(plan, problem, requests, chosen)  # asserts that all blocks are returned
    assert (~np.isnan(run.finished_s)).sum() + run.rejected == len(requests)
    assert run.migrated_bytes == pytest.approx(run.moved_bytes.sum())
    if not run.rejected:
        assert run.generated_tokens == run.output_tokens.sum()


def test_head_groups_that_a_stage_keeps_take_longer_beside_a_chunk() -> None:
    """Its workers have no chunks, so a factor of theirs changes nothing."""
    ends = []
    for own, workers in ((None, None), (40.0, None), (None, 40.0)):
        problem = small_problem(model=make_model(kv_heads=4), mixed_factor=own)
        small = make_profile("small", flops=1e12, bytes_per_s=1e10, usable_bytes=60_000_000, mixed_factor=workers)
        problem = replace(problem, profiles={**problem.profiles, "small": small})
        plan = plan_of(pipeline(problem, 6, micro_batch=8, in_flight=1, pool=(1, 1)))
        ends.append(simulate(plan, problem, equal_requests(30, prompt=60, output=60), AS_PLANNED).end_s)
    summed, kept, given = ends
    assert kept > 1.05 * summed
    assert given == summed


@pytest.mark.parametrize("chosen", [AS_PLANNED, Settings(redispatch=False), Settings(theta=0.0)])
def test_the_head_map_is_sound_in_the_middle_of_a_run(chosen: Settings) -> None:
    problem = small_problem(model=make_model(kv_heads=4))
    plan = plan_of(pipeline(problem, 3, 3, micro_batch=6, in_flight=2, pool=(2, 2)))
    (pool,) = pool_run(plan, problem, equal_requests(40, prompt=50, output=4000), chosen)
    pool.state.check_invariants()
    assert len(pool.homes) == len(pool.state) > 0
    for request, home in pool.homes.items():
        np.testing.assert_array_equal(home, pool.state.groups(str(request)))


def test_re_dispatch_sees_every_context_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two blocks the head map is out of date, which no other test would detect."""
    seen = list[tuple[int, int]]()

    def look(migration: Migration, _now_s: float, batch: Decoding, _moved: object) -> None:
        for request, origin in batch.decoding.items():
            seen.append((migration._state.context_tokens(str(request)), batch.step + 1 - origin))

    monkeypatch.setattr(Migration, "look", look)
    problem = small_problem(model=make_model(kv_heads=4))
    plan = plan_of(pipeline(problem, 3, 3, micro_batch=6, in_flight=2, pool=(2, 2)))
    pool_run(plan, problem, equal_requests(40, prompt=50, output=4000), Settings(theta=0.0))
    assert len(seen) > 20
    assert all(held == context for held, context in seen)


def test_requests_that_a_full_worker_evicts_give_back_their_blocks_on_every_stage() -> None:
    # Room is kept for the workload's two output tokens; they make 80. The worker is full long before the other stage,
    # which has already counted the block that an evicted request would have grown into.
    problem = small_problem(model=make_model(kv_heads=4), workload=make_workload((24, 2)))
    little = make_profile("small", usable_bytes=3_400_000)
    problem = replace(problem, profiles={**problem.profiles, "small": little})
    plan = plan_of(pipeline(problem, 3, 3, micro_batch=8, in_flight=2, pool=(1, 4)))
    run = simulate(plan, problem, equal_requests(24, prompt=21, output=80), AS_PLANNED)  # asserts that no block is kept
    assert run.num_preemptions > 0
    assert run.generated_tokens == 24 * 80


def test_the_plans_split_gives_every_request_its_groups_and_every_card_as_many() -> None:
    problem = small_problem(model=make_model(kv_heads=4))
    plan = plan_of(pipeline(problem, 6, micro_batch=8, in_flight=1, pool=(2, 1)))
    (pool,) = pool_run(plan, problem, equal_requests(8, prompt=20, output=4000), AS_PLANNED)
    homes = np.stack(list(pool.homes.values()))
    assert homes[:, 0].tolist() == [3] * 8
    assert homes[:, 1:].sum(axis=0).tolist() == [4, 4]


def test_dispatch_is_no_slower_than_the_plans_split() -> None:
    problem = small_problem(model=make_model(kv_heads=4))
    plan = plan_of(pipeline(problem, 6, micro_batch=8, in_flight=1, pool=(1, 3)))  # far too much for a slow card
    requests = equal_requests(30, prompt=400, output=60)
    planned, dispatched = (simulate(plan, problem, requests, one) for one in (AS_PLANNED, Settings(redispatch=False)))
    assert dispatched.end_s < 0.9 * planned.end_s


def test_re_dispatch_moves_head_groups_when_a_lost_worker_comes_back() -> None:
    problem = small_problem(model=make_model(kv_heads=4), workload=make_workload((700, 1200)), usable_bytes=120_000_000)
    plan = plan_of(pipeline(problem, 6, micro_batch=8, in_flight=1, pool=(2, 1)))
    requests = equal_requests(8, prompt=700, output=1200)
    faults = (Fault(at_s=0.5, device="small-0/0"), Fault(at_s=0.8, device="small-0/0", joins=True))
    still, moving = (
        simulate(plan, problem, requests, Settings(faults=faults, redispatch=redispatch, theta=0.05))
        for redispatch in (False, True)
    )
    assert still.migrations == 0
    assert still.num_preemptions > 0
    assert moving.migrations > 0
    assert moving.end_s < still.end_s
    assert moving.migrated_bytes > 0
    assert not np.isnan(moving.finished_s).any()


def test_cards_that_serve_two_stages_take_turns() -> None:
    problem = small_problem(model=make_model(kv_heads=4), usable_bytes=400_000_000)
    slow = make_profile("small", bytes_per_s=1e9, usable_bytes=400_000_000)  # nothing else limits the rate
    problem = replace(problem, profiles={**problem.profiles, "small": slow})
    one = pipeline(problem, 3, 3, micro_batch=8, in_flight=4)
    pools = tuple(AttentionWorkerPool(stage=n, gpu="small", devices=("small-0/0",), kv_head_groups=4) for n in (0, 1))
    stages = tuple(replace(stage, kv_head_groups_kept=0) for stage in one.stages)
    shared = replace(one, stages=stages, attention_workers=tuple(replace(pool, shared=True) for pool in pools))
    apart = replace(one, stages=stages, attention_workers=(pools[0], replace(pools[1], devices=("small-1/0",))))
    requests = equal_requests(60, prompt=300, output=100)
    together_s, alone_s = (simulate(plan_of(each), problem, requests, AS_PLANNED).end_s for each in (shared, apart))
    assert 1.8 * alone_s < together_s < 2.1 * alone_s


def test_moves_planned_for_an_evicted_request_are_dropped() -> None:
    """It may be placed again before their wave begins, with other homes."""
    problem = small_problem(model=make_model(kv_heads=4))
    plan = plan_of(pipeline(problem, 6, micro_batch=8, in_flight=1, pool=(2, 2)))
    (pool,) = pool_run(plan, problem, equal_requests(8, prompt=20, output=4000), Settings(theta=0.05))
    migration = pool._migration
    leaving, staying = list(pool.homes)[:2]
    moves = [
        Move(
            request=str(one),
            groups=1,
            source=0,
            target=1,
            num_bytes=1.0,
            seconds=1.0,
            payback_steps=None,
            reason=MoveReason.MEMORY,
            wave=wave,
            together=one,
        )
        for wave, one in ((1, leaving), (1, staying), (2, leaving))
    ]
    migration._waves = [moves[:2], moves[2:]]
    pool.remove(leaving)
    assert [[move.request for move in wave] for wave in migration._waves] == [[str(staying)], []]
