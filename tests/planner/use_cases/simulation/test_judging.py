"""A run of requests is held to a service level, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hetis.planner.use_cases.service_level import Latency, ServiceLevel, Statistic
from hetis.planner.use_cases.simulation.judging import (
    LevelVerdict,
    LimitVerdict,
    Measured,
    latencies_of,
    measured,
    verdict_of,
)
from hetis.simulator.metrics import measure, summarise
from hetis.simulator.steadiness import Estimate
from hetis.simulator.values import FloatArray, RequestLog, Run
from hetis.solver.plan import Objective

TAILS = ServiceLevel(ttft=Statistic.P99, tpot=Statistic.P90)


LIMITS = Objective(ttft_limit_s=0.2, tpot_limit_s=0.05)


def run_of(ttft_s: FloatArray) -> Run:
    """Return a run of one request a second with these TTFT and two tokens each, the second after 10 ms."""
    arrival_s = np.arange(len(ttft_s), dtype=np.float64)
    first = arrival_s + ttft_s
    log = RequestLog().run(float(len(ttft_s)), None)
    tokens = np.full(len(ttft_s), 2, np.int64)
    return replace(
        log, id=np.arange(len(ttft_s)), arrival_s=arrival_s, admitted_s=arrival_s, first_token_s=first,
        finished_s=first + 0.01, prompt_tokens=tokens, output_tokens=tokens,
    )  # fmt: skip


def judged(run: Run, level: ServiceLevel, limits: Objective) -> LevelVerdict:
    metrics = measure(run, limits, saturated=False)
    return verdict_of(level, limits, summarise([metrics]), [latencies_of(run, metrics)])


@pytest.mark.parametrize(("attainment", "kept"), [(0.9, True), (0.91, False), (0.05, True), (1.0, False)])
def test_a_share_that_is_reached_exactly_is_kept(attainment: float, kept: bool) -> None:
    # Every tenth of the requests is late, also of those after the warm-up, of which there is a multiple of ten.
    run = run_of(np.where(np.arange(4000) % 10 == 9, 0.3, 0.1))
    metrics = measure(run, LIMITS, saturated=False)
    start = int(np.ceil(metrics.window_start_s / 10.0)) * 10.0
    found = verdict_of(
        ServiceLevel(attainment=attainment), LIMITS, summarise([metrics]),
        [latencies_of(run, replace(metrics, window_start_s=start))],
    )  # fmt: skip
    assert found.limits[0].estimate.value == pytest.approx(0.9, abs=1e-12)
    assert found.kept is kept


def test_every_request_may_have_to_keep_the_limits() -> None:
    early = run_of(np.full(4000, 0.1))
    assert judged(early, ServiceLevel(attainment=1.0), LIMITS).kept is True
    late = run_of(np.where(np.arange(4000) == 3999, 0.3, 0.1))
    found = judged(late, ServiceLevel(attainment=1.0), LIMITS)
    assert (found.kept, found.sure) == (False, True)


def held_over(run: Run, level: ServiceLevel) -> Measured:
    """Compare a run with the limits without its warm-up, which some of these runs are too odd for."""
    summary = summarise([measure(run_of(np.full(len(run.arrival_s), 0.1)), LIMITS, saturated=False)])
    return measured(level, replace(summary, warm_up_s=0.0), run, LIMITS)


def test_requests_that_never_finish_are_the_slowest() -> None:
    run = run_of(np.full(1000, 0.1))
    lost = np.arange(1000) % 25 == 0  # 4%
    run = replace(run, finished_s=np.where(lost, np.nan, run.finished_s))
    beyond, below = (
        held_over(run, ServiceLevel(ttft=one)).seconds[Latency.TTFT] for one in (Statistic.P99, Statistic.P90)
    )
    assert beyond == np.inf
    assert below == pytest.approx(0.1)


def test_a_single_token_has_no_time_per_token() -> None:
    run = run_of(np.full(900, 0.1))
    single = np.arange(900) % 3 > 0
    slow = run.first_token_s + 0.2
    run = replace(
        run, output_tokens=np.where(single, 1, 2), finished_s=np.where(single, run.first_token_s, slow)
    )  # fmt: skip
    found = held_over(run, ServiceLevel(tpot=Statistic.P50))
    assert found.seconds[Latency.TPOT] == pytest.approx(0.2)
    share = held_over(run, ServiceLevel(attainment=0.9))
    assert share.missed[Latency.TPOT] == pytest.approx(1 / 3)


def test_no_request_gives_no_share_and_no_warning() -> None:
    run = run_of(np.zeros(0))
    summary = summarise([measure(run_of(np.full(10, 0.1)), LIMITS, saturated=False)])
    found = measured(ServiceLevel(attainment=0.9), summary, run, LIMITS)
    assert np.isnan(found.missed[Latency.TTFT])


def limit(*, kept: bool | None, sure: bool) -> LimitVerdict:
    return LimitVerdict(
        latency=Latency.TTFT, statistic=Statistic.P99, limit=1.0, estimate=Estimate(value=1.0), kept=kept, sure=sure
    )


@pytest.mark.parametrize(
    ("limits", "steady", "carried", "kept", "sure"),
    [
        ([(True, True), (True, True)], True, True, True, True),
        ([(True, True), (True, False)], True, True, True, False),
        ([(True, True), (False, False)], True, True, False, False),
        ([(False, True), (False, False)], True, True, False, True),
        ([(True, True)], None, True, True, False),
        ([(True, True)], False, False, False, True),
        ([(True, True)], None, False, False, False),  # waits grow, but the run is too short to be sure
        ([(None, False)], None, None, None, False),
        ([(None, False), (False, True)], None, None, False, True),
    ],
)
def test_a_level_is_kept_if_the_load_is_carried_within_all_limits(
    limits: list[tuple[bool | None, bool]], steady: bool | None, carried: bool | None, kept: bool | None, sure: bool
) -> None:
    parts = tuple(limit(kept=one, sure=certain) for one, certain in limits)
    found = LevelVerdict(limits=parts, missed={}, steady=steady, carried=carried)
    assert (found.kept, found.sure) == (kept, sure)


def test_a_short_run_whose_waits_grow_seems_not_to_be_carried() -> None:
    run = run_of(np.linspace(0.0, 10.0, 60))
    limits = replace(LIMITS, ttft_limit_s=100.0)
    found = judged(run, TAILS, limits)
    assert (found.steady, found.carried, found.kept, found.sure) == (None, False, False, False)
    assert not summarise([measure(run, limits, saturated=False)]).within(limits)
