"""Gavel's max-min, Gandiva_fair's trading and the equal split, and OEF's comparison with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from hetis.solver.shares.fair_shares import cooperative, equal_split, max_min, solve_shares, trading
from hetis.solver.shares.properties import properties_of
from hetis.solver.shares.share_problem import FairnessRule, ShareProblem
from hetis.solver.shares.shares_check import check_shares
from tests.solver.shares.instances import problems
from tests.solver.shares.test_oef import one_job_each


def test_a_trade_moves_fast_gpus_to_who_gains_most_at_the_mean_price() -> None:
    # Each tenant starts with half of each type. Ratios are 2 and 8, so the price of a fast GPU is 5 slow ones.
    problem = one_job_each({"slow": 10, "fast": 10}, (1.0, 2.0), (1.0, 8.0))
    assert trading(problem).amounts == pytest.approx(np.array([[10.0, 4.0], [0.0, 6.0]]))


def test_trades_of_many_gpus_leave_no_negative_rest() -> None:
    speedups = (1.2821270828600302, 1.5406694546839625, 0.6538525332091062), (
        1.1177633256446702, 0.7030127543747657, 0.742246082761862,
    )  # fmt: skip
    problem = one_job_each({"A": 62326, "B": 24, "C": 48093}, *speedups)
    weights = (2.6061755766352643, 1.3628543716456805)
    weighted = replace(
        problem, tenants=tuple(replace(t, weight=w) for t, w in zip(problem.tenants, weights, strict=True))
    )
    assert not check_shares(weighted, trading(weighted))


def test_nobody_is_paid_in_gpus_on_which_it_cannot_run() -> None:
    problem = one_job_each({"P100": 8, "H100": 8}, (0.0, 1.0), (1.0, 200.0))
    assert trading(problem).amounts == pytest.approx(problem.equal_split)


def test_claimants_of_very_unlike_speed_and_weight_have_shares_and_properties() -> None:
    problem = one_job_each({"a": 862_422, "b": 3, "c": 250_000}, (1.0, 3e6, 40.0), (2e6, 1.0, 5e3), (1.0, 1.0, 0.0))
    weights = (150.0, 0.007, 1.0)
    unlike = replace(
        problem, tenants=tuple(replace(t, weight=w) for t, w in zip(problem.tenants, weights, strict=True))
    )
    for rule in FairnessRule:
        shares = solve_shares(unlike, rule)
        assert not check_shares(unlike, shares)
        assert properties_of(unlike, shares.amounts).could_gain >= 0.0


@settings(max_examples=40, deadline=None)
@given(problems)
def test_trading_pays_for_everybody(problem: ShareProblem) -> None:
    found = properties_of(problem, trading(problem).amounts)
    assert found.over_equal_split.min() >= 1 - 1e-9
    assert np.abs(found.unused).max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(problems)
def test_max_min_raises_the_least_of_all_as_high_as_any_rule(problem: ShareProblem) -> None:
    least = properties_of(problem, max_min(problem).amounts).over_equal_split.min()
    for other in (equal_split(problem), trading(problem), cooperative(problem, tie_seconds=0.0)):
        assert properties_of(problem, other.amounts).over_equal_split.min() <= least * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(problems)
def test_cooperative_shares_are_worth_at_least_an_equal_split(problem: ShareProblem) -> None:
    assert cooperative(problem, tie_seconds=0.0).value >= equal_split(problem).value * (1 - 1e-9)


def test_waste_is_seen() -> None:
    problem = one_job_each({"slow": 4, "fast": 4}, (1.0, 2.0), (1.0, 8.0))
    found = properties_of(problem, problem.equal_split / 2)
    assert found.unused == pytest.approx([2.0, 2.0])
    assert found.could_gain > 1.0
    assert not found.is_efficient
