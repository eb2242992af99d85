"""Measured slowness is believed, but not too soon."""

from __future__ import annotations

import random

from hetis.planner.fleet.redispatching.watched import Slowness


def feed(slowness: Slowness, *ratios: float) -> list[bool]:
    return [slowness.observe("d", ratio, 1.0) for ratio in ratios]


def test_a_device_that_is_twice_as_slow_is_known_as_that_after_four_reports() -> None:
    slowness = Slowness()
    assert feed(slowness, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0) == [False] * 5 + [True, False]
    assert slowness.factors == {"d": 2.0}


def test_a_device_that_is_fast_again_is_exactly_as_profiled() -> None:
    slowness = Slowness()
    feed(slowness, *[2.0] * 7)
    assert feed(slowness, 1.02, 0.98, 1.05, 1.01) == [False, False, False, True]
    assert slowness.factors == {}


def test_outliers_and_noise_change_nothing() -> None:
    slowness, rng = Slowness(), random.Random(1)
    for n in range(2000):
        ratio = rng.lognormvariate(0.0, 0.08) if n % 5 else rng.choice([0.1, 8.0])
        assert not slowness.observe("d", ratio, 1.0)


def test_what_was_not_measured_says_nothing() -> None:
    slowness = Slowness()
    assert not any(slowness.observe("d", 0.0, 1.0) or slowness.observe("d", 5.0, 0.0) for _ in range(9))
    assert slowness.factors == {}
