"""Whole runs: requests are served, nothing is lost, time goes forward, and theory is met where it has an answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.simulator.simulate import simulate
from hetis.simulator.timing import StageTiming
from hetis.simulator.values import Fault, Request, RouterName, Settings
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from tests.models import replace
from tests.simulator.small_plans import equal_requests, pipeline, plan_of, small_problem
from tests.solver.instances import make_model, make_workload

AS_PLANNED = Settings(dispatch=False, redispatch=False)


class Waiting:
    """``count`` equal requests that are always waiting."""

    def __init__(self, count: int, *, prompt: int, output: int) -> None:
        self._left, self._lengths = iter(range(count)), (prompt, output)

    def next_request(self, now_s: float) -> Request | None:
        number = next(self._left, None)
        if number is None:
            return None
        return Request(id=number, arrival_s=now_s, prompt_tokens=self._lengths[0], output_tokens=self._lengths[1])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Plan, PlacementProblem, list[Request], Settings]:
    """Pipelines of one to three stages with copies, pools and little memory; requests of any lengths."""
    window = draw(st.sampled_from([None, None, (24, 1, True), (24, 2, True), (24, 2, False)]))
    model = make_model(num_layers=6, kv_heads=draw(st.sampled_from([2, 4])))
    if window is not None:
        model = replace(
            model, sliding_window=window[0], sliding_layers=-(-model.num_layers // window[1]), windows_free_kv=window[2]
        )
    problem = small_problem(
        gpus=16, model=model, usable_bytes=draw(st.sampled_from([10_500_000, 11_000_000, 60_000_000]))
    )
    layers = draw(st.sampled_from([(6,), (3, 3), (1, 2, 3)]))
    pool = draw(st.sampled_from([None, (1, 1), (2, 1)])) if model.heads_can_move else None
    replicas = [
        pipeline(
            problem,
            *layers,
            copies=[2 if pool is not None and pool[0] == 2 else draw(st.integers(1, 2)), 2, 1][: len(layers)],
            first=4 * n,
            micro_batch=draw(st.sampled_from([1, 3, 8])),
            in_flight=draw(st.sampled_from([1, 2, 5])),
            chunk_tokens=draw(st.sampled_from([8, 64])),
            pool=pool if pool is None or pool[0] == 2 else None,
        )
        for n in range(draw(st.integers(1, 2)))
    ]
    gaps = draw(st.lists(st.sampled_from([0.0, 1e-3, 0.05]), min_size=1, max_size=25))
    lengths = st.tuples(st.integers(1, 90), st.integers(1, 60))
    shares = st.sampled_from([0.0, 0.0, 0.5, 1.0]) if draw(st.booleans()) else st.just(0.0)
    requests = [
        Request(id=n, arrival_s=at, prompt_tokens=prompt, output_tokens=output, prefix_tokens=int(share * (prompt - 1)))
        for n, at in enumerate(itertools.accumulate(gaps))
        for prompt, output in [draw(lengths)]
        for share in [draw(shares)]
    ]
    chosen = Settings(
        router=draw(st.sampled_from(get_args(RouterName))),
        dispatch=False,
        redispatch=False,
        sample_every_s=draw(st.sampled_from([None, 0.01])),
    )
    return plan_of(*replicas), problem, requests, chosen


@given(cases())
@settings(max_examples=120)
def test_every_request_is_served_once_in_order_and_all_blocks_come_back(
    case: tuple[Plan, PlacementProblem, list[Request], Settings],
) -> None:
    plan, problem, requests, chosen = case
    run = simulate(plan, problem, requests, chosen)  # asserts itself that no block stays allocated
    served = ~np.isnan(run.finished_s)
    assert served.sum() + run.rejected == len(requests)
    assert run.prompt_tokens.tolist() == [request.prompt_tokens for request in requests]
    assert np.all(run.arrival_s[served] <= run.admitted_s[served])
    assert np.all(run.admitted_s[served] < run.first_token_s[served])
    assert np.all(run.first_token_s[served] <= run.finished_s[served])
    assert np.all(run.finished_s[served] <= run.end_s)
    once = served & (run.output_tokens > 1)
    assert np.all(run.first_token_s[once] < run.finished_s[once])
    if not run.rejected:
        assert run.generated_tokens == run.output_tokens.sum()
        computed = sum(request.prompt_tokens - request.prefix_tokens for request in requests)
        assert run.prefilled_tokens >= computed
        assert (run.prefilled_tokens == computed) or run.num_preemptions
    if run.series is not None:
        assert np.all((run.series.kv_used_fraction >= 0) & (run.series.kv_used_fraction <= 1))
        assert np.all(run.series.kv_used_fraction[-1] == 0)
        assert np.all(np.diff(run.series.times_s) > 0)


def with_prefix(requests: list[Request], tokens: int) -> list[Request]:
    return [replace(request, prefix_tokens=tokens) for request in requests]


def test_tokens_in_the_prefix_cache_are_not_computed() -> None:
    problem = small_problem()
    one = pipeline(problem, 6, micro_batch=4, in_flight=1, chunk_tokens=32)
    (stage,) = replica_shape(one, problem, Fleet.of(problem.cluster)).stages
    timing = StageTiming(problem, stage, is_first=True, is_last=True)
    run = simulate(plan_of(one), problem, with_prefix(equal_requests(1, prompt=70, output=1), 50), AS_PLANNED)
    assert run.prefilled_tokens == 20
    # One chunk of the last 20 tokens, which attend to 51, 52, ... 70 of them: 60.5 on average.
    assert run.first_token_s[0] == timing.seconds(0, 0.0, 20, 20 * 60.5, 60.5 + 10, 1)


def test_tokens_in_the_prefix_cache_take_blocks_like_any_others() -> None:
    problem = small_problem(usable_bytes=11_800_000)
    plan = plan_of(pipeline(problem, 6, micro_batch=16, in_flight=2))
    requests = equal_requests(60, prompt=20, output=80)
    cached = simulate(plan, problem, with_prefix(requests, 19), AS_PLANNED)
    assert cached.num_preemptions > 0
    # An evicted request finds its prefix again, and computes the rest.
    again = cached.prefilled_tokens - 60
    assert again >= cached.num_preemptions
    assert again < simulate(plan, problem, requests, AS_PLANNED).prefilled_tokens - 60 * 20
    too_long = simulate(plan, problem, with_prefix(equal_requests(1, prompt=4000, output=2), 3999), AS_PLANNED)
    assert too_long.rejected == 1


def test_a_request_computes_at_least_one_token_of_its_prompt() -> None:
    with pytest.raises(InvalidProblemError) as caught:
        Request(id=3, arrival_s=0.0, prompt_tokens=9, output_tokens=1, prefix_tokens=9)
    message = "request 3 has 9 of 9 prompt tokens in the prefix cache, at least one must be computed"
    assert str(caught.value) == message


def test_a_request_that_can_never_fit_is_rejected_and_the_others_are_served() -> None:
    problem = small_problem(usable_bytes=11_800_000)
    plan = plan_of(pipeline(problem, 6))
    requests = equal_requests(5, prompt=20, output=5)
    requests[2] = replace(requests[2], prompt_tokens=4000)
    run = simulate(plan, problem, requests, AS_PLANNED)
    assert run.rejected == 1
    assert np.flatnonzero(np.isnan(run.finished_s)).tolist() == [2]


def test_iterations_take_what_each_of_their_tokens_attends_to() -> None:
    # 80 tokens in chunks of 32, 32 and 16: a chunk's first token attends to those before it and itself. Logits are made
    # for the last one. Two more tokens follow, which attend to 81 and 82.
    problem = small_problem()
    one = pipeline(problem, 6, micro_batch=1, in_flight=1, chunk_tokens=32)
    run = simulate(plan_of(one), problem, equal_requests(1, prompt=80, output=3), AS_PLANNED)
    (stage,) = replica_shape(one, problem, Fleet.of(problem.cluster)).stages
    timing = StageTiming(problem, stage, is_first=True, is_last=True)
    chunks_s = [
        timing.seconds(0, 0.0, num, sum(range(before + 1, before + num + 1)), before + (num + 1) / 2 + num / 2, rows)
        for before, num, rows in ((0, 32, 0), (32, 32, 0), (64, 16, 1))
    ]
    assert run.first_token_s[0] == pytest.approx(sum(chunks_s), rel=1e-12)
    steps_s = [timing.seconds(1, float(context), 0, 0.0, 0.0, 1) for context in (81, 82)]
    assert run.finished_s[0] - run.first_token_s[0] == pytest.approx(sum(steps_s), rel=1e-9)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_chunks_of_a_prompt_follow_each_other_through_a_pipeline(in_flight: int) -> None:
    # Chunk k of a prompt starts when the stage is free, its predecessor is done there, and fewer than M are in flight.
    problem = small_problem()
    one = pipeline(problem, 1, 2, 3, micro_batch=1, in_flight=in_flight, chunk_tokens=32)
    run = simulate(plan_of(one), problem, equal_requests(1, prompt=5 * 32, output=1), AS_PLANNED)
    stages = [
        StageTiming(problem, stage, is_first=n == 0, is_last=n == 2)
        for n, stage in enumerate(replica_shape(one, problem, Fleet.of(problem.cluster)).stages)
    ]
    left_s = list[float]()  # the pipeline, by chunk
    free_s = [0.0, 0.0, 0.0]
    for k in range(5):
        at_s = left_s[k - in_flight] if k >= in_flight else 0.0
        pairs, read = sum(range(32 * k + 1, 32 * k + 33)), 32 * k + 16.5 + 16
        for n, stage in enumerate(stages):
            at_s = free_s[n] = max(at_s, free_s[n]) + stage.seconds(0, 0.0, 32, pairs, read, int(k == 4))
        left_s.append(at_s)
    assert run.first_token_s[0] == pytest.approx(left_s[-1], rel=1e-12)


def test_a_queue_of_one_server_waits_as_long_as_theory_says() -> None:
    # M/D/1: prompts that fill a chunk and make one token are served one by one, in equal times S. The mean wait is
    # rho S / (2 (1 - rho)) (Pollaczek and Khinchine).
    problem = small_problem(workload=make_workload((32, 1)))
    plan = plan_of(pipeline(problem, 6, micro_batch=1, in_flight=1, chunk_tokens=32))
    alone = simulate(plan, problem, equal_requests(1, prompt=32, output=1), AS_PLANNED)
    service_s = float(alone.finished_s[0])
    rho = 0.7
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(service_s / rho, 40_000))
    requests = (
        Request(id=n, arrival_s=at, prompt_tokens=32, output_tokens=1) for n, at in enumerate(arrivals.tolist())
    )
    run = simulate(plan, problem, requests, AS_PLANNED)
    wait_s = run.admitted_s - run.arrival_s
    assert float(np.mean(wait_s)) == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.1)
    # Lindley's recursion on the same arrivals: each request waits for the remaining work of those before.
    left_s, expected = 0.0, []
    for gap_s in np.diff(arrivals, prepend=arrivals[0]).tolist():
        left_s = max(0.0, left_s - gap_s)
        expected.append(left_s)
        left_s += service_s
    np.testing.assert_allclose(wait_s, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("in_flight", "copies"),
    [(1, (1, 1, 1)), (2, (1, 1, 1)), (3, (1, 1, 1)), (7, (1, 1, 1)), (1, (2, 1, 2)), (2, (2, 1, 2)), (8, (2, 1, 2))],
)
def test_a_closed_pipeline_of_equal_iterations_runs_at_the_limit_of_theory(
    in_flight: int, copies: tuple[int, ...]
) -> None:
    # Prompts that fill a chunk and make one token: every iteration is alike, so that M micro-batches circulate at
    # min(M / sum u, 1 / max (u / c)), c of them being processed at a time if M is a multiple of c.
    problem = small_problem(workload=make_workload((32, 1)))
    one = pipeline(problem, 1, 2, 3, copies=copies, micro_batch=1, in_flight=in_flight, chunk_tokens=32)
    run = simulate(plan_of(one), problem, Waiting(600, prompt=32, output=1), AS_PLANNED)
    shape = replica_shape(one, problem, Fleet.of(problem.cluster))
    seconds = [
        StageTiming(problem, stage, is_first=n == 0, is_last=n == 2).seconds(0, 0.0, 32, 32 * 16.5, 16.5 + 16, 1)
        for n, stage in enumerate(shape.stages)
    ]
    finished = np.sort(run.finished_s)
    rate = 400 / (finished[500] - finished[100])
    busiest_s = max(u / c for u, c in zip(seconds, copies, strict=True))
    limit = min(in_flight / sum(seconds), 1 / busiest_s)
    assert rate == pytest.approx(limit, rel=0.02)


def test_a_run_ends_at_its_horizon_with_what_there_is() -> None:
    problem = small_problem()

    def forever() -> Iterator[Request]:
        for n in itertools.count():
            yield Request(id=n, arrival_s=n * 1e-3, prompt_tokens=20, output_tokens=10)

    run = simulate(plan_of(pipeline(problem, 6)), problem, forever(), replace(AS_PLANNED, horizon_s=0.5))
    assert run.end_s == 0.5
    assert 0 < np.isnan(run.finished_s).sum() < run.num_requests
    assert np.nanmax(run.finished_s) <= 0.5


def test_arrivals_that_fall_are_refused() -> None:
    problem = small_problem()
    requests = [*equal_requests(2, prompt=5, output=5, every_s=1.0), *equal_requests(1, prompt=5, output=5)]
    with pytest.raises(InvalidProblemError, match=r"request 0 arrives at 0.0 s, before the one ahead of it at 1.0 s"):
        simulate(plan_of(pipeline(problem, 6)), problem, requests, AS_PLANNED)


def test_a_plan_that_contradicts_its_problem_is_refused() -> None:
    problem = small_problem(gpus=1)
    plan = plan_of(pipeline(problem, 3, 3))  # needs big-1/0
    with pytest.raises(InvalidProblemError, match="cannot be simulated"):
        simulate(plan, problem, [], AS_PLANNED)


def test_a_fault_of_an_unknown_device_is_refused() -> None:
    problem = small_problem()
    faults = (Fault(at_s=1.0, device="nowhere/0"),)
    with pytest.raises(InvalidProblemError, match="no device nowhere/0"):
        simulate(plan_of(pipeline(problem, 6)), problem, [], replace(AS_PLANNED, faults=faults))


def test_samples_do_not_prolong_a_run() -> None:
    problem = small_problem()
    plan, requests = plan_of(pipeline(problem, 6)), equal_requests(20, prompt=9, output=9, every_s=0.01)
    plain, sampled = (simulate(plan, problem, requests, Settings(sample_every_s=every)) for every in (None, 1000.0))
    assert sampled.end_s == plain.end_s == plain.finished_s.max()
    assert sampled.series.times_s.tolist() == [plain.end_s]
