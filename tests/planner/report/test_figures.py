"""Numbers formatted for people."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.report.figures import (
    bar,
    digits,
    percent,
    percent_at_least,
    percent_of_gap,
    plural,
    seconds,
    tokens,
    with_unit,
)
from hetis.planner.report.promises import verdict
from hetis.solver.plan import Status
from tests.planner import plans


@pytest.mark.parametrize(
    ("value_s", "text"),
    [(2, "2.00 s"), (1.2345, "1.23 s"), (0.0998, "99.8 ms"), (0.00034, "340 us"), (0, "0 s"), (75, "75.0 s")],
)
def test_seconds_choose_a_unit_that_leaves_three_digits(value_s: float, text: str) -> None:
    assert seconds(value_s) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.35, "1.350"), (12.345, "12.35"), (0.031, "0.03100"), (98765.4, "98,765"), (-2.5, "-2.500")],
)
def test_digits_keep_four_and_never_an_exponent(value: float, text: str) -> None:
    assert digits(value, 4) == text


@given(st.floats(min_value=1e-6, max_value=1e12))
def test_digits_round_by_less_than_one_in_a_hundred(value: float) -> None:
    assert float(digits(value).replace(",", "")) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0, "0.00%"), (0.0052, "0.52%"), (0.6, "60%"), (1, "100%"), (float("inf"), "unknown"), (float("nan"), "unknown")],
)
def test_small_shares_keep_decimals(ratio: float, text: str) -> None:
    assert percent(ratio) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.9999, "99%"), (1, "100%"), (0.29, "29%"), (0.83, "83%"), (0.00999, "0.99%"), (0.0052, "0.52%")],
)
def test_what_is_at_least_a_share_is_not_rounded_up(ratio: float, text: str) -> None:
    assert percent_at_least(ratio) == text


@pytest.mark.parametrize(("gap", "text"), [(2e-6, "0.01%"), (1e-4, "0.01%"), (0.00042, "0.04%"), (0.3, "30%")])
def test_no_plan_is_over_nothing_better(gap: float, text: str) -> None:
    assert percent_of_gap(gap) == text
    result = replace(plans.plan(plans.paper_replica()).result, status=Status.FEASIBLE, gap=gap)
    assert f"no plan of the family is over {text} better" in verdict(
        replace(plans.plan(plans.paper_replica()), result=result)
    )


@given(st.floats(min_value=-1, max_value=3), st.integers(min_value=1, max_value=60))
def test_a_bar_always_has_its_width(ratio: float, width: int) -> None:
    assert len(bar(ratio, width)) == width


def test_counts_and_nouns_agree() -> None:
    assert plural(1, "replica") == "1 replica"
    assert plural(1200, "replica") == "1,200 replicas"
    assert [tokens(n) for n in (980, 12_345, 4_560_000)] == ["980", "12.3k", "4.56M"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.0, "GPUs", "3 GPUs"),
        (1.0, "GPUs", "1 GPU"),
        (1200.0, "GPUs", "1,200 GPUs"),
        (0.0, "GPUs", "0 GPUs"),
        (2.4, "GPUs", "2.400 GPUs"),
        (math.inf, "GPUs", "unknown GPUs"),
        (3.0, "requests/s", "3.000 requests/s"),
    ],
)
def test_whole_gpus_have_no_decimals(value: float, unit: str, text: str) -> None:
    assert with_unit(value, unit) == text
