"""Metrics match their definitions, on runs worked out by hand and on a queue with a known answer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from hetis.simulator.arrivals import Arrivals, Load, Saturation, draw_traffic, requests_of
from hetis.simulator.metrics import Prediction, measure, prediction_of, summarise
from hetis.simulator.steadiness import Estimate
from hetis.simulator.values import Request, Run, Settings
from hetis.solver.plan import Objective
from hetis.solver.workload import LengthBin, Workload
from tests.planner import plans
from tests.simulator.fake_runs import queue_run, run_of

LIMITS = Objective(ttft_limit_s=1.0, tpot_limit_s=0.05)
NOTHING = math.nan


def request(number: int, arrival_s: float, output: int = 11) -> Request:
    return Request(id=number, arrival_s=arrival_s, prompt_tokens=100, output_tokens=output)


def load(rate_rps: float | None = 5.0, arrivals: Arrivals = Arrivals.DRAWN) -> Load:
    lengths = Workload(name="w", bins=(LengthBin(prompt_tokens=10, output_tokens=91, weight=1.0),))
    return Load(lengths=lengths, max_position=1000, rate_rps=rate_rps, arrivals=arrivals)


def even_run() -> Run:
    """100 requests, one a second: 0.2 s of queueing, 0.5 s to the first token, then 11 tokens in 1 s."""
    rows = [(request(i, float(i)), i + 0.2, i + 0.5, i + 1.5) for i in range(100)]
    return run_of(rows, end_s=100.5)


def test_every_latency_by_hand() -> None:
    found = measure(even_run(), Objective(ttft_limit_s=1.0, tpot_limit_s=0.2), saturated=False)
    for distribution, value in (
        (found.queueing_s, 0.2),
        (found.ttft_s, 0.5),
        (found.tpot_s, 0.1),  # ten gaps in a second
        (found.end_to_end_s, 1.5),
        (found.normalised_s, 1.5 / 11),
    ):
        assert [distribution.mean, distribution.p50, distribution.p99] == pytest.approx([value] * 3)
    assert found.mean_tpot_s.value == pytest.approx(0.1)
    assert found.ttft_p95_s.value == pytest.approx(0.5)
    assert found.steady is None  # a hundred requests are too few to tell
    assert found.attainment == 1.0
    assert found.throughput_rps.value == pytest.approx(1.0, rel=0.03)
    assert found.output_tokens_per_s == pytest.approx(11.0, rel=0.03)
    assert found.counts.finished == found.counts.arrived == 100


def test_the_warm_up_is_measured_by_nothing() -> None:
    rows = [(request(i, float(i)), i + 5.0, i + 9.0, i + 10.0) for i in range(100)]
    rows += [(request(i, float(i)), i + 0.2, i + 0.5, i + 1.5) for i in range(100, 600)]
    found = measure(run_of(rows, end_s=601.5), LIMITS, saturated=False)
    assert found.window_start_s == 100.0
    assert found.ttft_s.max == pytest.approx(0.5)
    assert found.counts.measured == 500
    assert found.counts.arrived == 600


def test_a_run_that_misses_a_limit_attains_nothing() -> None:
    assert measure(even_run(), Objective(ttft_limit_s=0.4, tpot_limit_s=None), saturated=False).attainment == 0.0
    assert measure(even_run(), Objective(ttft_limit_s=None, tpot_limit_s=0.09), saturated=False).attainment == 0.0
    assert math.isnan(measure(even_run(), Objective(ttft_limit_s=None, tpot_limit_s=None), saturated=False).attainment)


def test_mean_tpot_weighs_tokens_and_percentiles_weigh_requests() -> None:
    # Half the requests have 2 tokens 1 s apart, half 101 tokens 10 ms apart: (50 + 50) s over (50 + 5000) tokens.
    rows = [(request(i, float(i), 2 if i % 2 else 101), float(i), float(i), i + 1.0) for i in range(100)]
    found = measure(run_of(rows, end_s=101.0), LIMITS, saturated=False)
    assert found.mean_tpot_s.value == pytest.approx(100 / 5050, rel=0.02)
    assert found.tpot_s.mean == pytest.approx(0.505, rel=0.02)


def test_single_tokens_have_no_tpot_and_miss_no_limit_of_it() -> None:
    rows = [(request(i, float(i), 1), float(i), i + 0.5, i + 0.5) for i in range(100)]
    found = measure(run_of(rows, end_s=100.0), LIMITS, saturated=False)
    assert found.mean_tpot_s.value == 0.0
    assert math.isnan(found.tpot_s.mean)
    assert found.attainment == 1.0
    assert summarise([found]).within(LIMITS)


def test_requests_that_never_finish_are_counted_and_attain_nothing() -> None:
    rows = [(request(i, float(i)), i + 0.2, i + 0.5, i + 0.9 if i % 2 else NOTHING) for i in range(200)]
    found = measure(run_of(rows, end_s=300.0, rejected=40), LIMITS, saturated=False)
    assert found.counts.unfinished == 60
    assert found.counts.rejected == 40
    assert found.attainment == pytest.approx(0.5, abs=0.02)
    assert not found.steady  # half of the arrivals pile up


def test_what_was_rejected_before_the_window_hides_nothing_that_is_not_served_in_it() -> None:
    # The first 300 of 2,000 are rejected; of the last 800 three in ten are never served, 240 of the 1,700 others.
    rows = [(request(i, float(i)), i + 0.2, i + 0.5, i + 1.5) for i in range(2000)]
    late = [(*row[:3], NOTHING) if i >= 1200 and i % 10 < 3 else row for i, row in enumerate(rows)]
    early = [(row[0], NOTHING, NOTHING, NOTHING) if i < 300 else row for i, row in enumerate(late)]
    assert measure(run_of(rows, end_s=2002.0), LIMITS, saturated=False).steady
    assert measure(run_of(early, end_s=2002.0, rejected=300), LIMITS, saturated=False).steady is False


@pytest.mark.parametrize(("every", "steady"), [(10, False), (50, True)])
def test_a_load_of_which_more_than_a_few_are_rejected_is_not_carried(every: int, steady: bool) -> None:
    rows = [(request(i, float(i)), i + 0.2, i + 0.5, i + 1.5) for i in range(2000)]
    rows = [(row[0], NOTHING, NOTHING, NOTHING) if i % every == 0 else row for i, row in enumerate(rows)]
    found = measure(run_of(rows, end_s=2002.0, rejected=2000 // every), LIMITS, saturated=False)
    assert found.counts.unfinished == 0
    assert found.steady is steady


@pytest.mark.parametrize("load", [0.9, 1.1])
def test_one_server_at_random_is_taken_for_carried_when_it_is(load: float) -> None:
    found = [measure(single_server_run(load, 2000, seed), LIMITS, saturated=False).steady for seed in range(100)]
    if load < 1:
        assert found.count(True) >= 90
        assert False not in found
    else:
        assert found.count(True) <= 5
        assert False in found


def single_server_run(load: float, count: int, seed: int) -> Run:
    """M/M/1: Poisson arrivals, exponential service of 1 s on average, first come, first served."""
    rng = np.random.default_rng(seed)
    arrival_s, service_s = np.cumsum(rng.exponential(1 / load, count)), rng.exponential(size=count)
    ahead = np.cumsum(service_s) - service_s - arrival_s  # a server that never idles begins at arrival + ahead
    done_s = arrival_s + ahead - np.minimum.accumulate(ahead) + service_s
    empty = run_of([(request(i, 0.0, output=1), 0.0, 0.0, 0.0) for i in range(count)], end_s=float(done_s[-1]))
    return replace(empty, arrival_s=arrival_s, admitted_s=done_s - service_s, first_token_s=done_s, finished_s=done_s)


def test_a_load_that_is_carried_is_steady_and_one_that_is_not_is_not() -> None:
    # 8 seats, one second each: at most 8 requests/s are served.
    carried = measure(queue_run(requests_of(draw_traffic(load(6.0), 3000, seed=0))), LIMITS, saturated=False)
    assert carried.steady
    assert carried.throughput_rps.value == pytest.approx(carried.arrival_rps, rel=0.02)
    overloaded = measure(queue_run(requests_of(draw_traffic(load(10.0), 3000, seed=0))), LIMITS, saturated=False)
    assert not overloaded.steady
    assert overloaded.throughput_rps.value == pytest.approx(8.0, rel=0.01)
    assert not summarise([carried, overloaded]).steady


@pytest.mark.parametrize(
    ("rate_rps", "count", "steady"),
    [
        (6.0, 1500, True),  # the queue serves 8/s
        (10.0, 1500, False),
        (20.0, 400, False),
        (1.0, 1500, True),
        (1.0, 300, None),
        (7.0, 20, None),
        (20.0, 20, None),
        (0.5, 20, None),
        (8.0, 20, None),
    ],
)
def test_a_run_is_steady_or_grows_or_is_too_short_to_tell(rate_rps: float, count: int, steady: bool | None) -> None:
    for seed in range(5):
        run = queue_run(requests_of(draw_traffic(load(rate_rps), count, seed=seed)))
        assert measure(run, LIMITS, saturated=False).steady is steady, seed


def test_a_fleet_that_is_not_full_yet_has_shown_nothing() -> None:
    # 100 requests/s on 2,000 seats, each free after 30 s: one third is missing, which 10 s do not show.
    rows = [(request(i, i / 100), i / 100, i / 100 + 0.1, i / 100 + 30.0) for i in range(1000)]
    assert measure(run_of(rows, end_s=40.0), LIMITS, saturated=False).steady is None
    rows = [(request(i, i / 100), i / 100, i / 100 + 0.1, i / 100 + 30.0) for i in range(10_000)]
    found = measure(run_of(rows, end_s=130.0), LIMITS, saturated=False)
    assert found.steady
    assert found.window_start_s == pytest.approx(30.0, abs=0.02)
    assert found.throughput_rps.value == pytest.approx(100.0, rel=0.01)


def test_requests_that_finish_at_once_show_no_error_of_the_throughput() -> None:
    """In the past it was of the order of 1e12 requests/s."""
    rows = [(request(i, i / 500), i / 500, 1.0 + i // 500, 1.0 + i // 500) for i in range(2000)]
    found = measure(run_of(rows, end_s=5.0), LIMITS, saturated=False)
    assert found.throughput_rps.value > 0.0
    assert math.isnan(found.throughput_rps.half_width)


@pytest.mark.parametrize(("count", "steady"), [(10, None), (15, None), (40, True)])
def test_a_saturated_run_that_replaced_nobody_has_shown_nothing(count: int, steady: bool | None) -> None:
    run = queue_run(Saturation(draw_traffic(load(None, Arrivals.SATURATED), count, seed=0)))  # on 8 seats
    assert measure(run, LIMITS, saturated=True).steady is steady


def test_saturation_measures_what_can_be_served() -> None:
    source = Saturation(draw_traffic(load(None, Arrivals.SATURATED), 1000, seed=0))
    found = measure(queue_run(source), LIMITS, saturated=True)
    assert found.steady
    assert found.throughput_rps.value == pytest.approx(8.0, rel=0.02)


def test_little_s_law_holds_in_the_window() -> None:
    run = queue_run(requests_of(draw_traffic(load(7.0), 20_000, seed=4)))
    found = measure(run, LIMITS, saturated=False)
    start, end = found.window_start_s, found.window_end_s
    inside = np.clip(run.finished_s, start, end) - np.clip(run.arrival_s, start, end)
    in_system = inside.sum() / (end - start)
    assert in_system == pytest.approx(found.arrival_rps * found.end_to_end_s.mean, rel=0.02)


def test_devices_are_measured_in_the_window_only() -> None:
    run = queue_run(requests_of(draw_traffic(load(4.0), 2000, seed=1)), Settings(sample_every_s=1.0))
    found = measure(run, LIMITS, saturated=False)
    assert [use.device for use in found.devices] == ["a100/0", "a100/1"]
    # Half of the seats are taken on average (Little: 4/s of 1 s each over 8); the second device shows half of that.
    assert found.devices[0].busy_mean == pytest.approx(0.5, rel=0.06)
    assert found.devices[1].kv_mean == pytest.approx(found.devices[0].kv_mean / 2)
    assert found.devices[0].kv_max <= 1.0


@pytest.mark.parametrize("saturated", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_runs_of_hardly_any_request_have_metrics(count: int, saturated: bool) -> None:
    rows = [(request(i, float(i)), i + 0.2, i + 0.5, i + 0.9) for i in range(count)]
    found = measure(run_of(rows, end_s=1.0 * count), LIMITS, saturated=saturated)
    assert found.counts.arrived == count
    assert summarise([found, found]).num_runs == 2


@pytest.mark.parametrize(
    ("growth", "throughput_rps", "carried"),
    [(0.0, 5.0, True), (0.2, 5.0, False), (0.0, math.nan, None), (0.0, 0.0, None), (math.nan, 5.0, None)],
)
def test_a_load_of_which_nothing_can_be_told_is_not_taken_for_carried(
    growth: float, throughput_rps: float, carried: bool | None
) -> None:
    found = summarise([measure(run_of([(request(0, 0.0), 0.2, 0.5, 0.9)], end_s=1.0), LIMITS, saturated=False)])
    short = replace(found, steady=None, growth=Estimate(value=growth), throughput_rps=Estimate(value=throughput_rps))
    assert short.carried is carried
    assert short.within(Objective(ttft_limit_s=None, tpot_limit_s=None)) is (carried is True)
    assert replace(short, steady=True).carried is True


def test_a_run_of_which_nothing_finished_has_metrics() -> None:
    rows = [(request(i, float(i)), NOTHING, NOTHING, NOTHING) for i in range(100)]
    found = measure(run_of(rows, end_s=200.0), LIMITS, saturated=False)
    assert not found.steady
    assert math.isnan(found.ttft_s.p95)
    assert not summarise([found]).within(Objective(ttft_limit_s=None, tpot_limit_s=None))


def test_intervals_over_seeds_come_from_the_runs() -> None:
    runs = [
        measure(queue_run(requests_of(draw_traffic(load(6.0), 500, seed=seed))), LIMITS, saturated=False)
        for seed in range(5)
    ]
    summary = summarise(runs)
    values = [run.throughput_rps.value for run in runs]
    assert summary.throughput_rps.value == pytest.approx(np.mean(values))
    assert summary.throughput_rps.half_width == pytest.approx(2.776 * np.std(values, ddof=1) / math.sqrt(5))
    assert summary.counts.arrived == 2500
    assert summarise(runs[:1]).throughput_rps == runs[0].throughput_rps


def test_a_plan_predicts_the_sum_of_its_rates_the_worst_ttft_and_the_mean_tpot() -> None:
    plan = plans.plan(plans.paper_replica(), plans.paper_replica())
    assert prediction_of(plan) == Prediction(rate_rps=3.0, ttft_s=1.21, tpot_s=pytest.approx(0.0998))
    assert prediction_of(plans.plan()).rate_rps == 0


@pytest.mark.parametrize("count", [20, 60, 400])
def test_the_event_at_which_a_window_begins_is_not_counted(count: int) -> None:
    """One request a second arrives, and one is finished: at the same time where the next one takes its place."""
    rows = [(request(i, float(i)), i + 0.2, i + 0.5, i + 3.0) for i in range(count)]
    for saturated in (False, True):
        found = measure(run_of(rows, end_s=count + 3.0), Objective(), saturated=saturated)
        assert found.arrival_rps == pytest.approx(1.0)
        assert found.throughput_rps.value == pytest.approx(1.0)
        assert found.output_tokens_per_s == pytest.approx(11.0)
