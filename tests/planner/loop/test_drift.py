"""The drift test: its rate of false alarms in traffic that stays within its bands, and how soon it sees a change."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.loop.drift import Drift, DriftTest, Expected, dispersion, expected_shares, late, usual_dispersion
from hetis.solver.traffic import SECONDS, TOKENS, Histogram, TrafficSketch
from hetis.solver.workload import LengthBin, Workload

WINDOW_S = 10.0
DAY_WINDOWS = 8640


def chat(factor: float = 1.0) -> Workload:
    """Prompts of 100 to 3,000 tokens, outputs of 50 to 500, and the same with longer prompts."""
    lengths = [(100, 50), (400, 200), (900, 100), (1500, 500), (3000, 150)]
    bins = (LengthBin(prompt_tokens=p * factor, output_tokens=o, weight=1) for p, o in lengths)
    return Workload(name="chat", bins=tuple(bins))


def histogram(rng: np.random.Generator, requests: int, workload: Workload, lengths: str) -> Histogram:
    tokens = np.array([getattr(one, lengths) for one in workload.bins])[rng.integers(len(workload.bins), size=requests)]
    buckets = np.searchsorted(np.array(TOKENS.edges), tokens)
    counts = np.bincount(buckets, minlength=len(TOKENS.edges) + 1)
    return Histogram(scale=TOKENS, counts=tuple(map(float, counts)), total=float(tokens.sum()))


def sketch(rng: np.random.Generator, arrivals: int, workload: Workload | None = None) -> TrafficSketch:
    """The traffic of a window, in which as many requests end as arrive."""
    lengths = {}
    if workload is not None:
        lengths = {one: histogram(rng, arrivals, workload, one) for one in ("prompt_tokens", "output_tokens")}
    return TrafficSketch(seconds=WINDOW_S, arrivals=arrivals, **lengths)


def alarm_after(test: DriftTest, sketches: list[TrafficSketch], expected: Expected) -> Drift | None:
    for number, one in enumerate(sketches, 1):
        test = test.after(number * WINDOW_S, one, expected)
        if test.drift is not None:
            return test.drift
    return None


@given(
    st.floats(0.3, 50), st.sampled_from([(0.8, 1.2), (1.0, 1.2), (0.8, 1.0), (1.0, 1.0)]), st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_false_alarms_are_at_most_as_frequent_as_stated(rate: float, band: tuple[float, float], seed: int) -> None:
    """Also at the edges of the band. 0.2 alarms are stated for all runs together: 3 have a probability of 0.1%."""
    rng, runs, windows = np.random.default_rng(seed), 60, 60
    stated = 0.2 / (runs * windows / DAY_WINDOWS)
    expected = Expected(low_rps=band[0] * rate, high_rps=band[1] * rate)
    test = DriftTest(false_alarms_per_day=stated, window_s=WINDOW_S)
    counts = rng.poisson(rate * WINDOW_S, (runs, windows))
    alarms = sum(alarm_after(test, [sketch(rng, int(n)) for n in run], expected) is not None for run in counts)
    assert alarms < 3


def test_the_statistic_has_the_mean_that_the_bound_rests_on() -> None:
    """At the band's edge E[R] after N windows is N, by which Markov's inequality bounds the false alarms."""
    rng, rate, windows, runs = np.random.default_rng(1), 0.4, 5, 4000
    expected = Expected(low_rps=rate, high_rps=rate)
    reached = []
    for _ in range(runs):
        test = DriftTest(false_alarms_per_day=1e-9, window_s=WINDOW_S)
        for number in range(windows):
            test = test.after(number * WINDOW_S, sketch(rng, int(rng.poisson(rate * WINDOW_S))), expected)
        reached.append([math.exp(log[0]) for log in test.statistics.values()])
    for mean, deviation in zip(np.mean(reached, axis=0), np.std(reached, axis=0), strict=True):
        assert mean == pytest.approx(windows, abs=4 * deviation / math.sqrt(runs))


@given(st.floats(5, 200), st.integers(0, 2**32 - 1))
def test_a_doubling_is_seen_within_a_minute(rate: float, seed: int) -> None:
    """From 5 requests/s on, with a band of 20% and a false alarm every ten days."""
    rng = np.random.default_rng(seed)
    expected = Expected(low_rps=0.8 * rate, high_rps=1.2 * rate)
    windows = [sketch(rng, int(rng.poisson(2 * rate * WINDOW_S))) for _ in range(6)]
    drift = alarm_after(DriftTest(false_alarms_per_day=0.1, window_s=WINDOW_S), windows, expected)
    assert drift is not None
    assert drift.what == "rate"
    assert drift.rises
    assert drift.value == pytest.approx(2 * rate, rel=0.5)


def test_longer_prompts_are_seen_and_the_change_is_dated() -> None:
    rng = np.random.default_rng(2)
    expected = Expected(low_rps=8, high_rps=12, shares=expected_shares(chat(), 0.1))
    before = [sketch(rng, int(rng.poisson(100)), chat()) for _ in range(60)]
    after = [sketch(rng, int(rng.poisson(100)), chat(3.0)) for _ in range(6)]
    test = DriftTest(false_alarms_per_day=0.1, window_s=WINDOW_S)
    assert alarm_after(test, before, expected) is None
    drift = alarm_after(test, before + after, expected)
    assert drift is not None
    assert drift.is_of_mix
    assert 580 <= drift.since_s <= 630
    assert "prompts are longer than" in str(drift)


@given(st.integers(0, 2**32 - 1))
def test_a_mix_within_its_tolerance_is_no_drift(seed: int) -> None:
    rng = np.random.default_rng(seed)
    expected = Expected(low_rps=8, high_rps=12, shares=expected_shares(chat(), 0.05))
    windows = [sketch(rng, int(rng.poisson(100)), chat()) for _ in range(60)]
    assert alarm_after(DriftTest(false_alarms_per_day=0.1, window_s=WINDOW_S), windows, expected) is None


def test_bursty_counts_alarm_no_more_often_if_their_dispersion_is_known() -> None:
    """Arrivals in groups of four: four times Poisson, for which the bound is exact with phi = 4."""
    rng, rate = np.random.default_rng(3), 10.0
    expected = Expected(low_rps=rate, high_rps=rate)
    counts = 4 * rng.poisson(rate * WINDOW_S / 4, 3000)
    phi = dispersion(counts, np.full(len(counts), WINDOW_S))
    assert phi == pytest.approx(4, rel=0.1)
    test = DriftTest(false_alarms_per_day=0.1, window_s=WINDOW_S)
    sketches = [sketch(rng, int(n)) for n in counts]
    assert alarm_after(test, sketches, replace(expected, dispersion=phi)) is None
    assert alarm_after(test, sketches, expected) is not None


@given(st.floats(0.5, 50), st.integers(0, 2**32 - 1))
def test_windows_of_other_lengths_are_no_dispersion(rate: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(5, 15, 5000)
    assert dispersion(rng.poisson(rate * seconds), seconds) == pytest.approx(1, abs=0.15)


def test_some_jumps_are_no_usual_dispersion_and_bursts_are() -> None:
    rng, seconds = np.random.default_rng(4), np.full(180, 20.0)
    jumping = rng.poisson(600 * np.where(np.arange(180) // 18 % 2, 1.3, 1.0))
    assert usual_dispersion(jumping, seconds) == pytest.approx(1, abs=0.3)
    assert dispersion(jumping, seconds) > 1.5
    assert usual_dispersion(4 * rng.poisson(np.full(180, 150)), seconds) == pytest.approx(4, rel=0.3)
    assert usual_dispersion([160, 160, 260], seconds[:3]) == 1


def test_requests_of_one_length_have_bands_too() -> None:
    """All prompts have 500 tokens; as long ones are seen as those of any mix."""
    rng, one = (
        np.random.default_rng(5),
        Workload(name="one", bins=(LengthBin(prompt_tokens=500, output_tokens=60, weight=1),)),
    )
    expected = Expected(low_rps=8, high_rps=12, shares=expected_shares(one, 0.1))
    test = DriftTest(false_alarms_per_day=0.1, window_s=WINDOW_S)
    assert alarm_after(test, [sketch(rng, 100, one) for _ in range(60)], expected) is None
    longer = replace(one, bins=(LengthBin(prompt_tokens=800, output_tokens=60, weight=1),))
    drift = alarm_after(test, [sketch(rng, 100, longer)], expected)
    assert str(drift) == "100% of prompts are longer than 500 tokens, 0% to 10% were expected"


def firsts(*times_s: float, seconds: float = WINDOW_S) -> TrafficSketch:
    return TrafficSketch(seconds=seconds, ttft_s=Histogram.of_values(SECONDS, times_s))


def test_limits_are_broken_once_most_of_a_minute_is_late_and_still_is() -> None:
    in_time, too_late = firsts(*[0.2] * 10), firsts(*[9.0] * 10)
    assert late([in_time, too_late, too_late, too_late, in_time], 60, 5.0) is None  # it is over
    assert late([in_time, in_time, in_time, in_time, too_late], 60, 5.0) is None  # the last one alone
    assert late([too_late, too_late], 60, 5.0) is None  # not for long
    assert late([firsts(9.0)] * 5, 60, 5.0) is None  # too few to tell
    assert late([too_late] * 5, 60, None) is None
    assert late([], 60, 5.0) is None
    found = late([in_time, too_late, too_late, too_late, too_late], 60, 5.0)
    assert found is not None
    assert not found.is_of_mix
    assert str(found) == "80% of the first tokens of the last minute came after 5 s"


def test_no_traffic_is_a_drift_too() -> None:
    rng = np.random.default_rng(4)
    drift = alarm_after(
        DriftTest(false_alarms_per_day=0.1, window_s=WINDOW_S), [sketch(rng, 0)] * 6, Expected(low_rps=5, high_rps=9)
    )
    assert drift is not None
    assert not drift.rises
    assert str(drift) == "0 requests/s arrive, 5 to 9 were expected"
