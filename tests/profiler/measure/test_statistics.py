"""How long a point is measured: batches, warm-up, and a precise enough median. The timer is a fake."""

from __future__ import annotations

import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.profiler.measure.adaptive import SamplingRule, jitter, sample, spread_of_median


class FakeDevice:
    """A clock that only the timed calls move. The first call takes longer, as in reality."""

    def __init__(self, call_s: float, *, noise: float = 0.0, first_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.calls = 0
        self.batches: list[int] = []
        self._call_s, self._noise, self._first_s = call_s, noise, first_s
        self._random = random.Random(0)

    def time_calls(self, count: int) -> float:
        self.batches.append(count)
        seconds = count * self._call_s * (1 + self._noise * self._random.random())
        if self.calls == 0:
            seconds += self._first_s
        self.calls += count
        self.now_s += seconds
        return seconds

    def clock(self) -> float:
        return self.now_s


def test_a_steady_device_is_left_after_the_least_batches() -> None:
    device = FakeDevice(1e-3)
    found = sample(device.time_calls, device.clock, SamplingRule(warm_up_s=0.0))
    assert found.seconds == pytest.approx(1e-3)
    assert found.spread == pytest.approx(0.0)
    assert len(device.batches) == 1 + 5


def test_the_first_call_does_not_count() -> None:
    device = FakeDevice(1e-3, first_s=0.5)
    assert sample(device.time_calls, device.clock, SamplingRule()).seconds == pytest.approx(1e-3)


def test_short_calls_are_timed_in_batches() -> None:
    device = FakeDevice(1e-5)
    sample(device.time_calls, device.clock, SamplingRule(warm_up_s=0.0, batch_s=1e-3))
    assert device.batches[-1] == 100


def test_a_noisy_device_is_measured_more_often() -> None:
    steady, noisy = FakeDevice(1e-3, noise=0.01), FakeDevice(1e-3, noise=0.5)
    for device in (steady, noisy):
        sample(device.time_calls, device.clock, SamplingRule(warm_up_s=0.0))
    assert len(noisy.batches) > 2 * len(steady.batches)


def test_a_slow_call_ends_at_the_limit_with_three_samples() -> None:
    device = FakeDevice(10.0, noise=0.5)
    sample(device.time_calls, device.clock, SamplingRule(limit_s=1.0))
    assert len(device.batches) == 1 + 3


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=60))
def test_spread_does_not_depend_on_order_or_unit(samples: list[float]) -> None:
    assert spread_of_median(samples) == pytest.approx(spread_of_median([1e-3 * s for s in reversed(samples)]))
    assert 0 <= spread_of_median(samples) <= (max(samples) - min(samples)) / median(samples)


def test_a_busy_neighbour_shows_as_jitter() -> None:
    assert jitter([1.0] * 20) == 0.0
    assert jitter([1.0] * 15 + [3.0] * 5) == pytest.approx(2.0)
