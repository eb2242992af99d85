"""The search for the highest rate that keeps the limits below one that misses them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hetis.planner.use_cases.verification.lower_rates import LowerRates, StoppedError


@pytest.mark.parametrize(
    ("short_rps", "long_rps", "at_least_rps", "found"),
    [
        (97.5, 97.5, 0.0, 97.0),
        (70.0, 70.0, 0.0, 69.5),  # tries 97, 94, 88, 76, 50, then halves 50 to 76
        (70.0, 66.0, 0.0, 65.39),  # the longer run misses its limits at 69.5, and at 97% of that
        (98.0, 85.0, 0.0, 82.45),  # tries 97, and 85% of that
        (98.0, 75.0, 0.0, 71.54),  # keeps 70% of 97 and misses 85%, so it tries 77.5% and 73.75%
        (98.0, 77.0, 70.0, 76.23),  # keeps 70, so it tries halfway to 85% of 97
        (70.0, 90.0, 0.0, 85.14),  # longer runs keep more, in steps of 7%
        (20.0, 90.0, 0.0, 27.94),  # up to five of them
        (98.0, 200.0, 0.0, 97.0),  # but nothing is tried at or above the rate that misses
        (70.0, 30.0, 0.0, None),  # short runs mislead too much
        (10.0, 10.0, 0.0, None),
        (20.0, 20.0, 0.0, 19.92),
        (70.0, 70.0, 60.0, 70.0),  # searches only from 60 on
        (70.0, 70.0, 80.0, None),
        (70.0, 70.0, 100.0, None),
    ],
)
def test_the_highest_rate_below_a_missed_one_is_found_by_short_runs_and_decided_by_long_ones(
    short_rps: float, long_rps: float, at_least_rps: float, found: float | None
) -> None:
    tried = list[float]()

    def seems_sure(rate_rps: float) -> bool:
        tried.append(rate_rps)
        return rate_rps <= short_rps

    def is_sure(rate_rps: float) -> Iterator[bool]:
        tried.append(rate_rps)
        yield rate_rps <= long_rps

    kept_rps = LowerRates(seems_sure, is_sure).highest(100.0, at_least_rps)
    assert kept_rps == (None if found is None else pytest.approx(found, rel=1e-3))
    assert all(at_least_rps <= rate_rps < 100.0 for rate_rps in tried)


@pytest.mark.parametrize(
    ("sure_rps", "excluded_rps", "long_rps", "at_least_rps", "found"),
    [
        (0.0, 100.0, 90.0, 0.0, 88.0),  # short runs decide nothing; long ones miss 97 and 94
        (0.0, 100.0, 82.0, 0.0, 82.0),  # they keep 76, then 82, and 7% of 88 is the step
        (0.0, 100.0, 10.0, 0.0, None),
        (0.0, 60.0, 90.0, 0.0, 72.75),  # short runs exclude 76, so long ones try 50 and halve what is between
        (0.0, 100.0, 60.0, 80.0, None),
        (20.0, 100.0, 90.0, 0.0, 88.8),  # after five steps above 19.92, halves what is left below 100
        (20.0, 40.0, 90.0, 0.0, 48.6),  # short runs exclude 50
        (20.0, 21.0, 90.0, 0.0, 27.94),
    ],
)
def test_rates_that_short_runs_leave_undecided_are_decided_by_long_ones(
    sure_rps: float, excluded_rps: float, long_rps: float, at_least_rps: float, found: float | None
) -> None:
    """As where a share of the requests misses a strict limit at any rate, because their prompts alone take too long."""
    decided = list[float]()

    def seems_sure(rate_rps: float) -> bool | None:
        return rate_rps <= sure_rps or (None if rate_rps <= excluded_rps else False)

    def is_sure(rate_rps: float) -> Iterator[bool]:
        decided.append(rate_rps)
        yield rate_rps <= long_rps

    kept_rps = LowerRates(seems_sure, is_sure).highest(100.0, at_least_rps)
    assert kept_rps == (None if found is None else pytest.approx(found, rel=0.02))
    assert kept_rps is None or (at_least_rps <= kept_rps <= long_rps and kept_rps in decided)


@pytest.mark.parametrize(
    ("long_rps", "runs", "found"),
    [
        (90.0, 1, 69.5),  # long runs before it is cancelled: at 69.5, then at 74.4
        (90.0, 2, 74.37),
        (50.0, 6, 48.65),  # at 69.5, and at 97, 94, 91, 85 and 70% of that
        (50.0, 5, None),
    ],
)
def test_a_rate_that_was_found_is_kept_when_the_search_for_a_higher_one_is_cancelled(
    long_rps: float, runs: int, found: float | None
) -> None:
    tried = list[float]()

    def is_sure(rate_rps: float) -> Iterator[bool]:
        if len(tried) == runs:
            raise StoppedError
        tried.append(rate_rps)
        yield rate_rps <= long_rps

    search = LowerRates(lambda rate_rps: rate_rps <= 70.0, is_sure)
    if found is None:
        with pytest.raises(StoppedError):
            search.highest(100.0, 0.0)
    else:
        assert search.highest(100.0, 0.0) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize(
    ("short_runs", "long_rps", "long_runs", "likely"),
    [
        (4, 90.0, 0, None),  # at 97, 94, 88 and 76
        (5, 90.0, 0, 50.0),
        (6, 90.0, 0, 63.0),
        (99, 90.0, 0, 69.5),
        (99, 55.0, 1, 63.0),  # long runs miss at 69.5
        (99, 55.0, 3, 63.0),  # and at 97 and 94% of that
        (99, 55.0, 5, 50.0),  # and at 91 and 85%
    ],
)
def test_a_search_that_is_cancelled_tells_which_rate_short_runs_keep_and_long_ones_do_not_refute(
    short_runs: int, long_rps: float, long_runs: int, likely: float | None
) -> None:
    short, long = list[float](), list[float]()

    def tried(rates: list[float], most: int, rate_rps: float, highest_rps: float) -> bool:
        if len(rates) == most:
            raise StoppedError
        rates.append(rate_rps)
        return rate_rps <= highest_rps

    search = LowerRates(
        lambda rate_rps: tried(short, short_runs, rate_rps, 70.0),
        lambda rate_rps: iter([tried(long, long_runs, rate_rps, long_rps)]),
    )
    with pytest.raises(StoppedError):
        search.highest(100.0, 0.0)
    assert search.likely_rps == (None if likely is None else pytest.approx(likely, rel=1e-3))


def test_a_rate_that_usual_traffic_keeps_in_a_long_run_is_likely_if_none_is_left_for_other_traffic() -> None:
    def is_sure(rate_rps: float) -> Iterator[bool]:
        yield rate_rps <= 96.0
        raise StoppedError

    search = LowerRates(lambda rate_rps: rate_rps <= 98.0, is_sure)
    with pytest.raises(StoppedError):
        search.highest(100.0, 0.0)
    assert search.likely_rps == pytest.approx(0.97 * 97.0), "at 97 the long run misses"


def test_a_rate_kept_up_to_chance_is_likely_below_one_that_long_runs_of_other_traffic_miss() -> None:
    decided = list[float]()

    def is_sure(rate_rps: float) -> Iterator[bool]:
        if decided:
            raise StoppedError
        decided.append(rate_rps)
        yield from (True, False)

    search = LowerRates(lambda rate_rps: None if rate_rps > 90.0 else False, is_sure)
    with pytest.raises(StoppedError):
        search.highest(100.0, 0.0)
    assert (decided, search.likely_rps) == ([97.0], 94.0)


def test_a_short_run_at_a_high_rate_in_which_queues_had_no_time_to_grow_excludes_no_lower_rates() -> None:
    """2 H100 and 8 L4: p95 TTFT 13 times the limit at 0.463 requests/s in 500 requests, 17 times at 0.449 in 4,000."""
    excesses = {100.0: 12.0, 97.0: 16.8, 94.0: 13.4}

    def lower(excess: dict[float, float]) -> float | None:
        search = LowerRates(
            lambda rps: rps <= 80.0, lambda rps: iter([rps <= 80.0]), lambda rps: excess.get(round(rps))
        )
        return search.highest(100.0, 0.0)

    assert lower(excesses) == pytest.approx(79.0, abs=1.5)


def test_queues_cut_off_alike_leave_out_no_rate_below_half_of_a_missed_one() -> None:
    tried = list[float]()

    def seems_sure(rps: float) -> bool:
        tried.append(round(rps))
        return rps <= 30.0

    search = LowerRates(seems_sure, lambda rps: iter([rps <= 30.0]), lambda rps: 0.44 if rps > 30.0 else -0.5)
    assert search.highest(100.0, 0.0) == pytest.approx(29.0, abs=1.5)
    assert tried[:3] == [97, 50, 25], "rates between 97 and 50 are left out: the excess does not fall"
