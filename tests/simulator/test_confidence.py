"""95% intervals contain the true value 19 times out of 20."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hetis.simulator.steadiness import Estimate, over_runs, t_quantile, within_run


def test_quantiles_are_those_of_students_t() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    for degrees in (*range(1, 40), 60, 120, 1000):
        true = float(scipy_stats.t.ppf(0.975, degrees))
        assert t_quantile(degrees) == pytest.approx(true, rel=1e-3)
        assert degrees <= 30 or t_quantile(degrees) >= true


def test_three_runs_by_hand() -> None:
    # mean 2, standard deviation 1, standard error 1/sqrt(3), t(2) = 4.303
    found = over_runs([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))


def test_runs_without_a_value_are_left_out() -> None:
    assert over_runs([1.0, math.nan, 3.0]).value == 2.0
    assert math.isnan(over_runs([math.nan]).value)
    assert math.isnan(over_runs([5.0]).half_width)
    assert over_runs([5.0]).value == 5.0


@pytest.mark.parametrize("statistic", [np.mean, lambda part: np.percentile(part, 95)])
def test_intervals_within_a_run_cover_the_truth(statistic: object) -> None:
    rng = np.random.default_rng(7)
    truth = 1.0 if statistic is np.mean else -math.log(0.05)
    covered = 0
    for _ in range(300):
        found = within_run(rng.exponential(size=2000), statistic)  # type: ignore[arg-type]
        covered += abs(found.value - truth) <= found.half_width
    assert 270 <= covered <= 298  # 285 are expected


def test_intervals_within_a_run_see_that_observations_depend_on_each_other() -> None:
    rng = np.random.default_rng(3)
    slow = np.repeat(rng.normal(size=200), 50)  # 10,000 observations, 200 of them independent
    found = within_run(slow, np.mean)
    independent = 2 * slow.std() / math.sqrt(len(slow))
    assert found.half_width > 4 * independent


def test_a_short_run_has_a_value_and_no_interval() -> None:
    found = within_run(np.arange(50.0), np.mean)
    assert found.value == 24.5
    assert math.isnan(found.half_width)
    assert math.isnan(within_run(np.empty(0), np.mean).value)


def test_an_interval_lies_on_a_side_of_a_limit_only_as_a_whole() -> None:
    estimate = Estimate(value=1.0, half_width=0.1)
    assert estimate.is_below(1.1)
    assert not estimate.is_below(1.05)
    assert estimate.is_above(0.89)
    assert not estimate.is_above(0.95)
    unknown = Estimate(value=1.0)
    assert not unknown.is_below(2.0)
    assert not unknown.is_above(0.5)
