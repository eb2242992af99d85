"""Warm-up is cut where it ends, and piling up is told from chance."""

from __future__ import annotations

import numpy as np
import pytest

from hetis.simulator.steadiness import grows, warm_up


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


def test_requests_pile_up_when_more_come_than_chance_explains() -> None:
    assert not grows(arrived=1000, finished=1000)
    assert not grows(arrived=1000, finished=940)
    assert grows(arrived=1000, finished=930)  # 70 > 2 sqrt(1000) > 5%
    assert grows(arrived=10_000, finished=9_400)
