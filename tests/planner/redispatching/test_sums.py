"""The cheap check has exact times and a valid bound, and misses no trigger."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.planner.convert.stages import StageTerms, stage_from_proto
from hetis.planner.fleet.redispatching.watched import NEAR, StageSums, SumTest, sums_of
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.solver.redispatch.redispatch_problem import RedispatchProblem
from hetis.solver.redispatch.triggers import TriggerKind, ideal_dispatch, makespan_s, triggers
from hetis.v1 import report_pb2
from tests.planner.redispatching.messages import head_map_message, load_message, stage_message
from tests.solver.redispatch.instances import problems, random_problem

OK = report_pb2.DEVICE_STATUS_OK


def read(problem: RedispatchProblem) -> tuple[StageTerms, StageSums]:
    model = stage_message(problem)
    terms = stage_from_proto(model)
    known = (OK,) * len(terms.gpus)
    return terms, sums_of(load_message(head_map_message(problem.snapshot), model), terms, known)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_makespan_of_the_sums_is_that_of_the_head_map(problem: RedispatchProblem) -> None:
    terms, sums = read(problem)
    assert SumTest(terms).makespan_s(sums) == pytest.approx(makespan_s(problem.snapshot), rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_no_placement_is_faster_than_the_bound(problem: RedispatchProblem) -> None:
    terms, sums = read(problem)
    if all(device.status is DeviceStatus.OK for device in problem.snapshot.devices):
        ideal = ideal_dispatch(problem.snapshot, Dispatcher(terms.stage))
        if not ideal.unplaced:
            assert SumTest(terms).bound_s(sums) <= ideal.makespan_s * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 14), min_size=2, max_size=6), st.sampled_from([0.1, 0.5]))
def test_no_deviation_is_missed_also_not_with_the_bound_of_another_load(
    seed: int, loads: list[int], theta: float
) -> None:
    whole = random_problem(seed, num_devices=4, num_requests=14, pieces=2, tp=1)
    model = stage_message(whole)
    terms = stage_from_proto(model)
    test, dispatcher = SumTest(terms), Dispatcher(terms.stage)
    for num in loads:
        snapshot = replace(
            whole.snapshot,
            ids=whole.snapshot.ids[:num],
            context_tokens=whole.snapshot.context_tokens[:num],
            remaining_tokens=whole.snapshot.remaining_tokens[:num],
            groups=whole.snapshot.groups[:num],
        )
        sums = sums_of(load_message(head_map_message(snapshot), model), terms, (OK,) * 4)
        deviation = test.deviation(sums, theta)
        exact = test.makespan_s(sums) / test.bound_s(sums) - 1
        assert (deviation > theta) == (exact > theta)
        if deviation > theta:
            assert exact / (1 + NEAR) - NEAR <= deviation <= exact * (1 + 1e-9)
        fired = triggers(snapshot, dispatcher, theta=theta)
        if any(trigger.kind is TriggerKind.DEVIATION for trigger in fired):
            assert deviation > theta


def test_the_bound_is_not_far_below_the_ideal_where_memory_does_not_matter() -> None:
    ratios = []
    for seed in range(20):
        problem = random_problem(seed, num_devices=6, num_requests=60, head_groups=8, slack=20.0)
        terms, sums = read(problem)
        ideal = ideal_dispatch(problem.snapshot, Dispatcher(terms.stage))
        ratios.append(SumTest(terms).bound_s(sums) / ideal.makespan_s)
    assert sorted(ratios)[len(ratios) // 2] > 0.75
