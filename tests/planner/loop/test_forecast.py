"""Forecasts: their coverage, the rules they choose, and histories made of windows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hetis.planner.loop.curves import composed_curve
from hetis.planner.loop.forecast import BIN_S, LEVEL_MINUTES, MINUTE_S, History, Level, Window, forecast, with_hours
from hetis.solver.errors import InvalidProblemError
from hetis.solver.traffic import TrafficSketch
from hetis.solver.workload import FloatArray, LengthBin, Workload

DAY = 288
CHAT = Workload(name="chat", bins=(LengthBin(prompt_tokens=500, output_tokens=200, weight=1),))


def composed(days: int, seed: int = 0) -> FloatArray:
    """Rates of five minutes of a composed service."""
    curve = composed_curve(CHAT, days=1, history_days=days - 1, peak_rps=30, seed=seed)
    rates: FloatArray = curve.rates.reshape(-1, 5).mean(axis=1)
    return rates


def measured(days: int, seed: int = 0) -> FloatArray:
    """The same as Poisson arrivals tell them."""
    rates: FloatArray = np.random.default_rng(seed + 100).poisson(composed(days, seed) * BIN_S) / BIN_S
    return rates


@pytest.mark.parametrize("coverage", [0.8, 0.96])
def test_what_comes_is_within_the_interval_as_often_as_stated(coverage: float) -> None:
    """By a week's history, over four days; peaks overlap, so that misses cluster and need a margin of three points.

    What is forecast is the rate: counts of it are beyond that by chance as well.
    """
    missed_high = missed_low = asked = 0
    for seed in range(4):
        rates, true = measured(11, seed), composed(11, seed)
        for now in range(7 * DAY, len(rates) - 12, 11):
            found = forecast(History(end_s=now * BIN_S, rates=rates[:now]), 3600, coverage)
            came = true[now : now + 12]
            missed_high += came.max() > found.high_rps
            missed_low += came.min() < found.low_rps
            asked += 1
    assert missed_high / asked <= 1 - coverage + 0.03
    assert missed_low / asked <= 1 - coverage + 0.03
    assert missed_high / asked >= (1 - coverage) / 4  # no wider than it must be


def test_a_season_is_used_once_it_is_known_and_tells_the_morning_before_it_comes() -> None:
    rates = measured(10)
    at_seven = 9 * DAY + 7 * 12
    found = forecast(History(end_s=at_seven * BIN_S, rates=rates[:at_seven]), 3600, 0.96)
    assert found.rule.startswith(("yesterday", "last week", "the last seven days"))
    assert found.expected_rps > 1.15 * rates[at_seven - 1]
    young = forecast(History(end_s=3600, rates=rates[:12]), 3600, 0.96)
    assert young.rule == "the recent rate"


def test_little_history_has_wide_intervals_that_narrow() -> None:
    steady = np.full(400, 10.0)
    highs = [forecast(History(end_s=n * BIN_S, rates=steady[:n]), 900, 0.96).high_rps for n in (1, 20, 399)]
    assert highs == sorted(highs, reverse=True)
    assert highs[0] > 12
    assert highs[-1] == pytest.approx(10)


def test_a_level_that_is_known_to_have_changed_replaces_the_last_bins() -> None:
    rates = measured(10)
    history = History(end_s=len(rates) * BIN_S, rates=rates)
    usual = forecast(history, 1800, 0.96)
    doubled = forecast(history, 1800, 0.96, level_rps=2 * float(rates[-1]))
    assert doubled.expected_rps > 1.5 * usual.expected_rps


def test_minutes_count_before_the_hours_that_contain_them() -> None:
    def window(start_s: float, seconds: float, rate: float) -> Window:
        return Window(start_s=start_s, traffic=TrafficSketch(seconds=seconds, arrivals=rate * seconds))

    minutes = [window(7200 + 60 * i, 60, 4.0) for i in range(60)]
    found = History.of_windows(
        [window(0, 3600, 1.0), window(3600, 3600, 2.0), window(7200, 3600, 3.0), *minutes], 10_800
    )
    hours, fine = found.rates[:24], found.rates[24:]
    assert fine.tolist() == [4.0] * 12
    assert (np.diff(hours) >= 0).all()
    assert hours[[6, 17]] == pytest.approx([1.04, 1.96], abs=0.01)  # of the middles of hours, half a bin beside
    assert len(found.recent) == 60
    assert found.traffic_since(10_740).arrivals == 240


def test_hours_have_the_unevenness_of_the_minutes() -> None:
    uneven = 10.0 + 2.0 * (-1.0) ** np.arange(36)
    fine = np.concatenate([np.full(240, np.nan), uneven])
    spans = np.array([(12.0 * n, 12.0) for n in range(20)])
    found = with_hours(fine, spans, np.full(20, 10.0))
    assert found[240:].tolist() == uneven.tolist()
    assert found[:240].std() == pytest.approx(2.0, rel=0.05)
    assert found[:240].mean() == pytest.approx(10.0, rel=0.01)


def test_without_traffic_there_is_no_forecast() -> None:
    with pytest.raises(InvalidProblemError, match="no traffic to forecast from"):
        forecast(History(end_s=0, rates=np.full(5, np.nan)), 900, 0.96)
    with pytest.raises(InvalidProblemError, match="coverage is 1, must be at least"):
        forecast(History(end_s=0, rates=np.ones(5)), 900, 1.0)


def test_minutes_are_kept_in_their_places_and_a_partial_one_counts_by_its_rate() -> None:
    now_s = 10_000 * MINUTE_S
    starts = [now_s - MINUTE_S * back for back in (6, 5, 3, 2, 1)]
    seconds = [60.0, 60.0, 60.0, 60.0, 30.0]
    windows = [
        Window(start_s=start, traffic=TrafficSketch(seconds=each, arrivals=each * number))
        for number, (start, each) in enumerate(zip(starts, seconds, strict=True), 1)
    ]
    found = History.of_windows(windows, now_s)
    np.testing.assert_array_equal(found.minutes, [1.0, 2.0, np.nan, 3.0, 4.0, 5.0])
    assert found.by_minutes() is not None
    assert History.of_windows(windows[:4], now_s).by_minutes() is None  # too few


def test_chance_is_no_error_of_a_steady_rate_and_demand_still_is() -> None:
    rng = np.random.default_rng(1)
    steady = rng.poisson(np.full(180, 8.0 * MINUTE_S)) / MINUTE_S
    restless = steady * np.where(np.arange(180) // 5 % 2, 1.4, 1.0)
    over = [
        found.high_rps / found.expected_rps - 1
        for rates in (steady, restless)
        for found in [forecast(History(end_s=0.0, rates=rates, bin_s=MINUTE_S), 120.0, 0.95)]
    ]
    assert over[0] < 0.06
    assert over[1] > 0.2


def test_the_level_is_the_mean_of_minutes_or_since_a_jump() -> None:
    def level_after(*rates: float) -> Level:
        counts = np.random.default_rng(3).poisson(np.array(rates) * 20.0)
        recent = tuple(
            Window(start_s=20.0 * k, traffic=TrafficSketch(seconds=20.0, arrivals=float(n)))
            for k, n in enumerate(counts)
        )
        return History(end_s=20.0 * len(rates), rates=np.zeros(0), recent=recent).level()

    steady, jumped = level_after(*[30.0] * 60), level_after(*[30.0] * 60, 45.0)
    assert steady.rate_rps == pytest.approx(30.0, rel=3 * steady.chance)
    assert steady.chance == pytest.approx(1 / math.sqrt(30 * 60 * LEVEL_MINUTES), rel=0.1)
    assert jumped.rate_rps == pytest.approx(45.0, rel=3 * jumped.chance)
    assert jumped.chance == pytest.approx(1 / math.sqrt(45 * 20), rel=0.1)


def test_the_start_of_a_service_does_not_widen_the_first_forecasts() -> None:
    minutes = np.array([0.0, 0.1, 2.0, *[12.0] * 20])
    for known in range(5, len(minutes) + 1):
        found = forecast(History(end_s=0.0, rates=minutes[:known], bin_s=MINUTE_S), 120.0, 0.95)
        assert found.high_rps < 1.5 * 12
