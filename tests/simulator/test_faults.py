"""Devices that fail and recover."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.simulator.simulate import simulate
from hetis.simulator.values import Fault, Settings
from tests.simulator.small_plans import equal_requests, pipeline, plan_of, small_problem
from tests.solver.instances import make_model

AS_PLANNED = Settings(dispatch=False, redispatch=False)
DEVICES = ("big-0/0", "big-1/0", "big-2/0", "big-4/0", "small-0/0", "small-1/0", "small-7/0")


@given(
    st.lists(st.tuples(st.sampled_from(DEVICES), st.floats(0, 0.4), st.floats(0.001, 0.2)), min_size=1, max_size=6),
    st.booleans(),
)
@settings(max_examples=40)
def test_whatever_fails_and_comes_back_nothing_is_lost(outages: list[tuple[str, float, float]], dispatch: bool) -> None:
    problem = small_problem(model=make_model(kv_heads=4))
    plan = plan_of(
        pipeline(problem, 2, 4, copies=(2, 1), in_flight=4, pool=(2, 1)), pipeline(problem, 3, 3, first=4)
    )  # fmt: skip
    faults = tuple(
        fault
        for device, at_s, for_s in outages
        for fault in (Fault(at_s=at_s, device=device), Fault(at_s=at_s + for_s, device=device, joins=True))
    )
    chosen = Settings(dispatch=dispatch, faults=faults)
    requests = equal_requests(60, prompt=60, output=30, every_s=5e-3)
    run = simulate(plan, problem, requests, chosen)  # asserts that all blocks are returned
    assert not np.isnan(run.finished_s).any()
    assert run.generated_tokens == 60 * 30


def test_without_another_replica_requests_wait_for_the_device() -> None:
    problem = small_problem()
    plan = plan_of(pipeline(problem, 6))
    requests = equal_requests(10, prompt=60, output=100)
    gone = Fault(at_s=0.02, device="big-0/0")
    forever = simulate(plan, problem, requests, replace(AS_PLANNED, faults=(gone,)))
    assert np.isnan(forever.finished_s).all()
    back = Fault(at_s=2.0, device="big-0/0", joins=True)
    run = simulate(plan, problem, requests, replace(AS_PLANNED, faults=(gone, back)))
    assert run.finished_s.min() > 2.0


@pytest.mark.parametrize(
    ("router", "least", "most"),
    [
        ("weighted", 74, 76), ("weighted-random", 65, 85), ("nginx", 51, 74), ("fewest-requests", 49, 51),
        ("fewest-tokens", 49, 51),
    ],
)  # fmt: skip
def test_routers_follow_the_planned_rates_or_the_queues(router: str, least: int, most: int) -> None:
    problem = small_problem()
    plan = plan_of(pipeline(problem, 6, rate=3.0), pipeline(problem, 6, first=1, rate=1.0))
    requests = equal_requests(100, prompt=60, output=100, every_s=1e-3)
    run = simulate(plan, problem, requests, replace(AS_PLANNED, router=router))  # type: ignore[arg-type]
    assert least <= int((run.replica == 0).sum()) <= most
