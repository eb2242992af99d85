"""Windows of traffic: nothing is lost or counted twice, rates are those of the time that was observed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.convert.traffic import HOUR_S, MINUTE_S, TrafficWindow
from hetis.planner.fleet.traffic import KEPT_S, SETTLE_S, TrafficWindows, of_role
from hetis.solver.plan import Role
from hetis.solver.traffic import TOKENS, Histogram, TrafficSketch

START_S = 1_000_000 * HOUR_S  # a full hour


def reading(clock_s: float, num: float) -> TrafficSketch:
    lengths = Histogram.of_buckets(TOKENS, {500.0: num / 2, 1000.0: num}, 500.0 * num)
    return TrafficSketch(seconds=clock_s, arrivals=num, prompt_tokens=lengths, output_tokens=lengths)


def fed(
    windows: TrafficWindows, until_s: float, *, rate: float = 2.0, every_s: float = 5.0, offset_s: float = 1.3
) -> None:
    """Feed a replica's steady traffic from the start until a time."""
    time_s = START_S + offset_s
    while time_s < until_s:
        windows.take("r", "m", reading(time_s - START_S, rate * (time_s - START_S)), time_s)
        time_s += every_s


@given(st.lists(st.tuples(st.floats(0.1, 40), st.integers(0, 50)), min_size=1, max_size=60))
def test_every_request_is_in_one_window(steps: list[tuple[float, int]]) -> None:
    windows, time_s, total = TrafficWindows(), float(START_S), 0
    windows.take("r", "m", reading(0.0, 0), time_s)
    for seconds, num in steps:
        time_s, total = time_s + seconds, total + num
        windows.take("r", "m", reading(time_s - START_S, total), time_s)
        windows.complete(time_s - 60)  # reports are less than a minute apart
    found = [one.traffic for one in windows.windows() if one.span_s == MINUTE_S]
    assert sum(one.arrivals for one in found) == pytest.approx(total)
    assert sum(one.seconds for one in found) == pytest.approx(time_s - START_S)


def test_a_steady_rate_is_the_rate_of_every_window() -> None:
    windows = TrafficWindows()
    fed(windows, START_S + HOUR_S + 90)
    windows.complete(START_S + HOUR_S + 90)
    found = windows.windows()
    assert [one.traffic.rate_per_s for one in found] == [pytest.approx(2.0)] * len(found)
    hours = [one for one in found if one.span_s == HOUR_S]
    assert [one.traffic.seconds for one in hours] == [pytest.approx(HOUR_S - 1.3)]
    assert hours[0].traffic.prompt_tokens.mean == pytest.approx(500)


def test_replicas_that_take_turns_have_the_rate_of_one() -> None:
    windows = TrafficWindows()
    for name, times in (("a", range(0, 35, 5)), ("b", range(30, 95, 5))):
        for at in times:
            windows.take(name, "m", reading(at, 3.0 * at), float(START_S + at))
    assert windows.windows()[0].traffic.rate_per_s == pytest.approx(3.0)


def test_the_first_reading_of_an_engine_counts_nothing() -> None:
    windows = TrafficWindows()
    assert windows.take("r", "m", reading(9.0, 1e6), START_S) is None
    assert windows.windows() == []


def test_a_complete_window_never_changes() -> None:
    windows = TrafficWindows()
    fed(windows, START_S + 58)
    now_s = START_S + MINUTE_S + SETTLE_S
    (done,) = windows.complete(now_s)
    windows.take("r", "m", reading(now_s - START_S, 1000), now_s)
    assert windows.windows()[0] == done
    assert windows.complete(now_s) == []


def test_a_gap_without_readings_was_not_observed() -> None:
    windows = TrafficWindows()
    fed(windows, START_S + 30)
    windows.take("new", "m", reading(0.0, 0), START_S + 600)
    windows.take("new", "m", reading(6.0, 60), START_S + 606)
    (last,) = (one for one in windows.windows() if one.start_s == START_S + 600)
    assert last.traffic.rate_per_s == pytest.approx(10)


def test_what_is_kept_is_bounded() -> None:
    minutes = [window(MINUTE_S, at) for at in range(START_S - 6 * HOUR_S, START_S, MINUTE_S)]
    hours = [window(HOUR_S, at) for at in range(START_S - 30 * 24 * HOUR_S, START_S, HOUR_S)]
    windows = TrafficWindows([*minutes, *hours])
    gone = windows.drop(START_S)
    kept = windows.windows()
    assert len(gone) + len(kept) == len(minutes) + len(hours)
    assert len(kept) <= KEPT_S[MINUTE_S] // MINUTE_S + KEPT_S[HOUR_S] // HOUR_S


def window(span_s: int, start_s: int) -> TrafficWindow:
    return TrafficWindow(model="m", span_s=span_s, start_s=start_s, traffic=reading(span_s, 1.0))


def test_hours_survive_a_restart_within_them() -> None:
    minutes = [window(MINUTE_S, START_S + at * MINUTE_S) for at in range(30)]
    windows = TrafficWindows(minutes)  # of an earlier planner
    (hour,) = windows.complete(START_S + HOUR_S + SETTLE_S)
    assert (hour.span_s, hour.traffic.arrivals, hour.traffic.seconds) == (HOUR_S, 30.0, 30 * MINUTE_S)


def test_a_request_on_two_replicas_is_counted_once() -> None:
    both = replace(reading(1.0, 8), tpot_s=TrafficSketch().tpot_s)
    prefill, decode = of_role(both, Role.PREFILL), of_role(both, Role.DECODE)
    assert prefill.beside(decode) == both
    assert of_role(both, Role.UNIFIED) == both
