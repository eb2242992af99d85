"""Iterations that only decode, computed together, are those that single events would have been."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.simulator import disciplines
from hetis.simulator.simulate import simulate
from hetis.simulator.values import Request, Run, Settings
from hetis.solver.plan import KvRoute, Plan, Role
from hetis.solver.problem import PlacementProblem
from tests.simulator.small_plans import pipeline, plan_of, small_problem, with_role
from tests.solver.instances import make_compressed

ARRIVALS = st.lists(
    st.tuples(st.floats(0.0, 0.05), st.integers(1, 60), st.integers(1, 120)), min_size=1, max_size=25
)  # seconds after the one before it, and tokens


def both(plan: Plan, problem: PlacementProblem, requests: list[Request], until: Settings) -> tuple[Run, Run, int]:
    """Return the run with iterations one by one and the one with runs of them, and how many of these there were."""
    begun = 0

    def counted(*arguments: object) -> disciplines.DecodeRun | None:
        nonlocal begun
        run = original(*arguments)  # type: ignore[arg-type]
        begun += run is not None
        return run

    original = disciplines.next_iterations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disciplines, "next_iterations", lambda *_: None)
        one_by_one = simulate(plan, problem, requests, until)
        patch.setattr(disciplines, "next_iterations", counted)
        return one_by_one, simulate(plan, problem, requests, until), begun


def assert_equal(one: Run, other: Run) -> None:
    for each in fields(Run):
        mine, its = getattr(one, each.name), getattr(other, each.name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, its, err_msg=each.name)
        else:
            assert mine == its, each.name


@settings(max_examples=40, deadline=None)
@given(
    ARRIVALS, st.integers(1, 5), st.sampled_from([60_000_000, 8_000_000]), st.sampled_from([None, 0.2]), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_runs_of_iterations_change_no_time_and_no_count(
    arrivals: list[tuple[float, int, int]], micro_batch: int, usable_bytes: int, horizon_s: float | None,
    is_apart: bool, has_window: bool,
) -> None:  # fmt: skip
    problem = small_problem(usable_bytes=usable_bytes, model=make_compressed() if has_window else None)
    layers = problem.model.num_layers
    one, two = (
        pipeline(problem, 1, layers - 1, first=first, micro_batch=micro_batch, in_flight=1, chunk_tokens=16)
        for first in (0, 2)
    )
    plan = plan_of(one, two)
    if is_apart:
        pair = with_role(one, Role.PREFILL), with_role(two, Role.DECODE)
        plan = plan_of(*pair, routes=(KvRoute(prefill=0, decode=1, rate=1.0),))
    at_s, requests = 0.0, list[Request]()
    for number, (gap_s, prompt, output) in enumerate(arrivals):
        at_s += gap_s
        requests.append(Request(id=number, arrival_s=at_s, prompt_tokens=prompt, output_tokens=output))
    one_by_one, together, _ = both(plan, problem, requests, Settings(horizon_s=horizon_s))
    assert_equal(one_by_one, together)


def test_a_lone_request_decodes_in_one_run() -> None:
    problem = small_problem()
    plan = plan_of(pipeline(problem, problem.model.num_layers, in_flight=1))
    request = Request(id=0, arrival_s=0.0, prompt_tokens=8, output_tokens=100)
    one_by_one, together, begun = both(plan, problem, [request], Settings())
    assert begun == 1
    assert_equal(one_by_one, together)


@pytest.mark.parametrize("num", [2, 3, 4, 12])
def test_a_run_ends_where_a_block_is_missing(num: int) -> None:
    problem = small_problem(usable_bytes=8_000_000)
    plan = plan_of(pipeline(problem, 1, problem.model.num_layers - 1, micro_batch=num, in_flight=1))
    requests = [Request(id=n, arrival_s=0.0, prompt_tokens=40, output_tokens=150) for n in range(num)]
    one_by_one, together, begun = both(plan, problem, requests, Settings())
    assert begun
    assert one_by_one.num_preemptions
    assert_equal(one_by_one, together)
