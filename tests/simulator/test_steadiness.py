"""Warm-up is cut where it ends, and growing queues are distinguished from chance."""

from __future__ import annotations

import numpy as np
import pytest

from hetis.simulator.steadiness import Estimate, filled_s, growth, is_carried, warm_up


@pytest.mark.parametrize("seed", range(5))
def test_a_transient_is_cut_off_and_little_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    series = 10 + rng.normal(size=2000)
    series[:300] += np.linspace(-30, 0, 300)
    assert 200 <= warm_up(series) <= 500


def test_a_steady_series_keeps_most_of_itself() -> None:
    cuts = [warm_up(np.random.default_rng(seed).exponential(size=2000)) for seed in range(40)]
    assert np.mean(cuts) < 400
    assert max(cuts) <= 1000


def test_a_cut_is_where_the_standard_error_of_the_rest_is_least() -> None:
    series = np.concatenate([np.full(20, 50.0), np.tile([1.0, 2.0, 3.0, 2.0, 1.0, 3.0, 4.0, 5.0, 4.0, 3.0], 30)])
    assert warm_up(series) == 20


@pytest.mark.parametrize("count", [0, 1, 7, 49])
def test_too_few_observations_lose_half(count: int) -> None:
    assert warm_up(np.ones(count)) == count // 2


def test_the_second_half_is_never_cut() -> None:
    series = np.concatenate([np.zeros(900), [1e6], np.zeros(99)])
    assert warm_up(series) <= 500


def test_a_fleet_is_full_when_requests_have_stayed_as_long_as_they_do() -> None:
    assert filled_s(np.arange(5.0, 105.0), np.full(100, 7.0)) == 12.0


@pytest.mark.parametrize("served", [0.5, 0.8, 1.0])
def test_the_wait_grows_by_what_comes_over_what_is_served(served: float) -> None:
    arrival_s = np.arange(200.0)  # one a second; number n is served at n / served
    found = growth(arrival_s, 3.0 + arrival_s / served - arrival_s)
    assert found.value == pytest.approx(1 / served - 1, abs=1e-9)
    assert found.half_width == pytest.approx(0.0, abs=1e-9)


def test_the_interval_of_a_growth_holds_the_true_one_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        arrival_s = np.cumsum(rng.exponential(size=300))
        found = growth(arrival_s, 0.1 * arrival_s + rng.normal(scale=20.0, size=300))
        hits += abs(found.value - 0.1) <= found.half_width
    assert 180 <= hits <= 199


def test_a_load_is_carried_or_not_or_nobody_can_tell() -> None:
    assert is_carried(Estimate(value=0.0, half_width=0.02), arrived=1000) is True
    assert is_carried(Estimate(value=0.02, half_width=0.02), arrived=10_000) is True
    # Of 1,000 requests 1.5 / sqrt(1000) = 4.7% may be missing by chance, and fewer than 900 prove nothing.
    assert is_carried(Estimate(value=0.02, half_width=0.02), arrived=1000) is None
    assert is_carried(Estimate(value=0.0, half_width=0.0), arrived=800) is None
    assert is_carried(Estimate(value=0.04, half_width=0.02), arrived=1000) is None
    assert is_carried(Estimate(value=0.2, half_width=0.02), arrived=1000) is False
    # 60 requests may arrive 2 / sqrt(60) = 26% faster than on average, by chance.
    assert is_carried(Estimate(value=0.2, half_width=0.02), arrived=60) is None


def test_nothing_is_said_of_fewer_than_fifty_requests_or_of_one_moment() -> None:
    assert is_carried(growth(np.arange(49.0), np.arange(49.0)), arrived=49) is None
    assert growth(np.arange(49.0), 2 * np.arange(49.0)).value == pytest.approx(2.0)
    assert is_carried(growth(np.zeros(100), np.arange(100.0)), arrived=100) is None
    assert np.isnan(growth(np.zeros(0), np.zeros(0)).value)
