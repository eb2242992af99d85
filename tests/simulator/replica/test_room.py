"""Requests that are longer than the room of some replicas, or of all."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.simulator.events import Events
from hetis.simulator.replica import ReplicaRun
from hetis.simulator.simulate import Builder, simulate
from hetis.simulator.values import Fault, Request, RequestLog, RouterName, Settings
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from tests.models import replace
from tests.simulator.replica.test_kv_transfers import split_plan
from tests.simulator.small_plans import equal_requests, pipeline, plan_of, small_problem
from tests.solver.instances import make_model

LITTLE = 11_500_000  # bytes of a GPU that has room for a few hundred tokens


def replicas_of(plan: Plan, problem: PlacementProblem, chosen: Settings | None = None) -> list[ReplicaRun]:
    return Builder(plan, problem, RequestLog(), Events(), chosen or Settings()).replicas()


def little_and_large() -> tuple[PlacementProblem, Plan]:
    """Return a replica on one GPU, and one on two GPUs with more room than that."""
    problem = small_problem(model=make_model(kv_heads=4), usable_bytes=LITTLE)
    return problem, plan_of(pipeline(problem, 6), pipeline(problem, 3, 3, first=2))


@settings(max_examples=40)
@given(
    st.sampled_from([None, (1, 1), (1, 4), (2, 3)]), st.booleans(), st.sampled_from([None, 40]),
    st.integers(8_000_000, 14_000_000),
)  # fmt: skip
def test_the_room_of_a_replica_is_exact(
    pool: tuple[int, int] | None, dispatch: bool, window: int | None, usable_bytes: int
) -> None:
    model = replace(make_model(kv_heads=4), sliding_window=window)
    problem = small_problem(model=model, usable_bytes=usable_bytes)
    plan, chosen = plan_of(pipeline(problem, 3, 3, pool=pool)), Settings(dispatch=dispatch, redispatch=False)
    (replica,) = replicas_of(plan, problem, chosen)
    most = replica.most_tokens
    for prompt, fits in ((most, True), (most + 1, False)):
        if 1 <= prompt < 1 << 20:
            run = simulate(plan, problem, [Request(id=0, arrival_s=0.0, prompt_tokens=prompt, output_tokens=1)], chosen)
            assert run.rejected == (not fits)


@pytest.mark.parametrize("router", get_args(RouterName))
def test_a_request_goes_to_a_replica_with_room_for_it(router: RouterName) -> None:
    problem, plan = little_and_large()
    few, many = (replica.most_tokens for replica in replicas_of(plan, problem))
    assert few < many
    requests = equal_requests(10, prompt=few + 1, output=3, every_s=1.0)
    run = simulate(plan, problem, requests, Settings(router=router))
    assert run.rejected == 0
    assert np.all(run.replica == 1)


def test_a_request_that_outgrows_its_replica_continues_on_a_larger_one() -> None:
    problem, plan = little_and_large()
    few, _ = (replica.most_tokens for replica in replicas_of(plan, problem))
    run = simulate(plan, problem, equal_requests(1, prompt=few - 2, output=20), Settings(router="fewest-requests"))
    assert run.rejected == 0
    assert run.preemptions.tolist() == [1]
    assert run.replica.tolist() == [1]


def test_a_long_request_waits_for_the_replica_with_room_for_it() -> None:
    problem, plan = little_and_large()
    few, _ = (replica.most_tokens for replica in replicas_of(plan, problem))
    faults = (Fault(at_s=0.0, device="big-2/0"), Fault(at_s=3.0, device="big-2/0", joins=True))
    run = simulate(plan, problem, equal_requests(3, prompt=few + 1, output=3, every_s=0.1), Settings(faults=faults))
    assert run.rejected == 0
    assert np.all(run.first_token_s > 3.0)


def test_what_no_replica_has_room_for_is_rejected_at_once() -> None:
    problem, plan = little_and_large()
    most = max(replica.most_tokens for replica in replicas_of(plan, problem))
    requests = [
        Request(id=n, arrival_s=n * 1e-3, prompt_tokens=most + 1 if n == 5 else 9, output_tokens=9) for n in range(40)
    ]
    run = simulate(plan, problem, requests)
    assert run.rejected == 1
    assert np.flatnonzero(np.isnan(run.finished_s)).tolist() == [5]


@pytest.mark.parametrize("too_much", [4, -4])
def test_a_prompt_that_no_decode_replica_has_room_for_does_not_stop_the_others(too_much: int) -> None:
    # With 4 tokens too few it fits, but outgrows the room.
    problem = small_problem(model=make_model(kv_heads=4), usable_bytes=LITTLE)
    plan = split_plan(problem)
    _, decode = replicas_of(plan, problem)
    requests = [
        Request(
            id=n, arrival_s=n * 0.01, prompt_tokens=decode.most_tokens + too_much if n == 5 else 9, output_tokens=20
        )
        for n in range(60)
    ]  # fmt: skip
    run = simulate(plan, problem, requests)
    assert run.rejected == 1
    assert np.flatnonzero(np.isnan(run.finished_s)).tolist() == [5]


def test_prompts_wait_no_longer_than_until_a_worker_returns() -> None:
    problem = small_problem(model=make_model(kv_heads=4))
    faults = (Fault(at_s=1e-4, device="small-2/0"), Fault(at_s=5.0, device="small-2/0", joins=True))
    chosen = Settings(faults=faults, dispatch=False, redispatch=False)
    run = simulate(
        split_plan(problem, pool=True), problem, equal_requests(10, prompt=9, output=9, every_s=0.01), chosen
    )
    assert not np.isnan(run.finished_s).any()
