"""Costs follow measured step times: within bounds, and stable under noise."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.runtime.vllm.calibration import calibrate, token_bytes, with_coefficients
from hetis.runtime.vllm.costs import FORGET_STEPS, CostTracker, LayerTime
from hetis.solver.dispatch.dispatch_problem import HeadShape, Primary, Stage
from tests.runtime.vllm.paced import SHAPE, FakeClock, Pace, paced_devices

COSTS = Stage(
    heads=HeadShape(head_groups=4, queries_per_group=2, kv_bytes_per_token=10.0, exchange_bytes_per_head=4.0),
    devices=("a", "b"),
    head_s=np.array([[1.0], [1.0]]),
    kv_byte_s=np.array([[0.1], [0.1]]),
    call_s=np.array([[5.0], [5.0]]),
    transfer_byte_s=np.zeros(2),
    transfer_s=np.zeros(2),
    primary=Primary(device=0),
)
LAYER_S = 2 * 1.0 + 100 * 0.1 + 5.0  # calibrated time of `taken`


def taken(times: float, *, least: float | None = None) -> LayerTime:
    return LayerTime(
        heads=2, kv_bytes=100.0, least_s=LAYER_S * (times if least is None else least), most_s=LAYER_S * times
    )


class Watched:
    """A `CostTracker` of devices a and b, and the scales that it applied."""

    def __init__(self) -> None:
        self.applied: list[Stage] = []
        self.following = CostTracker(COSTS, self.applied.append)

    def steps(self, count: int, one: LayerTime | None, device: int = 1) -> None:
        for _ in range(count):
            if one is not None:
                self.following.record(device, one)
            self.following.advance()

    @property
    def scale(self) -> float:
        return self.following.scales[1]


def test_a_device_that_turns_slow_is_taken_for_slow_after_half_a_window() -> None:
    watched = Watched()
    watched.steps(30, taken(1.0))
    assert watched.applied == []
    watched.steps(7, taken(4.0))
    assert watched.scale == 1.0
    watched.steps(1, taken(4.0))
    assert watched.following.scales == (1.0, 4.0)
    [costs] = watched.applied
    assert costs.head_s.tolist() == [[1.0], [4.0]]
    assert costs.call_s.tolist() == [[5.0], [20.0]]


@pytest.mark.parametrize(("times", "bound"), [(1000.0, 8.0), (1e-3, 1 / 8)])
def test_scales_have_bounds(times: float, bound: float) -> None:
    watched = Watched()
    watched.steps(40, taken(times))
    assert watched.scale == bound


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**16))
def test_noise_and_single_outliers_change_nothing(seed: int) -> None:
    watched, chooser = Watched(), random.Random(seed)
    for number in range(100):
        noise = chooser.uniform(0.85, 1.2)
        watched.steps(1, taken(noise * (50.0 if number % 5 == 0 else 1.0)))
    assert watched.applied == []


def test_an_answer_that_was_there_before_it_was_asked_for_only_bounds_what_it_took() -> None:
    watched = Watched()
    watched.steps(40, taken(5.0, least=0.2))  # bounds of 0.2 and 5 times contain 1, which is kept
    assert watched.applied == []
    watched.steps(40, taken(0.5, least=0.1))  # at most half as long as predicted
    assert watched.scale == 0.5


def test_a_scale_that_changed_waits_for_a_window_before_it_changes_again() -> None:
    watched = Watched()
    watched.steps(15, taken(2.0))
    watched.steps(14, taken(4.0))
    assert watched.scale == 2.0
    watched.steps(1, taken(4.0))
    assert watched.scale == 4.0


def test_a_device_that_nobody_measures_gets_another_chance() -> None:
    watched = Watched()
    watched.steps(15, taken(4.0))
    watched.steps(FORGET_STEPS + 1, None)
    assert watched.scale == 2.0
    watched.steps(3 * (FORGET_STEPS + 1), None)
    assert watched.scale == 1.0
    assert len(watched.applied) == 5  # 4, 2, the root of 2, the root of that, 1


def test_large_changes_are_logged_once_and_small_ones_are_not(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    with caplog.at_level(logging.WARNING, logger="hetis.runtime.vllm.costs"):
        watched.steps(40, taken(1.5))
        assert caplog.messages == []
        watched.steps(40, taken(4.0))
        watched.steps(40, taken(5.5))
    assert caplog.messages == ["device b takes 4 times what was measured at the start"]


# --- in the loop


class World:
    """Three paced devices that are calibrated and then compute the same steps, on the test's own clock."""

    def __init__(self) -> None:
        clock = self.clock = FakeClock()
        self.paces = Pace(call_s=1e-6), Pace(), Pace()
        start = Stage(
            heads=HeadShape(head_groups=4, queries_per_group=2, kv_bytes_per_token=64.0, exchange_bytes_per_head=96.0),
            devices=("d0", "d1", "d2"),
            head_s=np.ones((3, 1)),
            kv_byte_s=np.ones((3, 1)),
            call_s=np.ones((3, 1)),
            transfer_byte_s=np.zeros(3),
            transfer_s=np.zeros(3),
            primary=Primary(device=0),
        )
        found = {}
        for device in paced_devices(self.paces, clock, pages=1000)(SHAPE):
            one = calibrate(device, groups=4, exchange_bytes_per_head=96.0, clock=clock, pause=clock.pause)
            assert one is not None
            found[device.name] = one.coefficients
        self.costs = with_coefficients(start, found)
        self.following = CostTracker(self.costs, self.apply)
        self.position = 0

    def apply(self, costs: Stage) -> None:
        self.costs = costs

    def step(self, times: int = 1) -> None:
        """The next position of a request with two heads on each device, all of which compute at the same time."""
        for _ in range(times):
            self.position += 1
            heads, kv_bytes = 2 * SHAPE.queries_per_group, 2.0 * self.position * token_bytes(SHAPE)
            for number, pace in enumerate(self.paces):
                seconds = pace.seconds(heads, kv_bytes)
                taken = LayerTime(heads=heads, kv_bytes=kv_bytes, least_s=seconds, most_s=seconds)
                self.following.record(number, taken)
            self.following.advance()


def test_calibrated_devices_take_what_was_calibrated() -> None:
    world = World()
    world.step(60)
    assert world.following.scales == (1.0, 1.0, 1.0)


def test_a_device_that_turns_four_times_slower_costs_four_times_as_much_until_it_recovers() -> None:
    world = World()
    before = world.costs
    world.step(2)
    world.paces[1].slow = 4.0
    world.step(20)
    assert world.following.scales == pytest.approx((1, 4, 1), rel=0.02)
    assert world.costs.kv_byte_s[:, 0] == pytest.approx(before.kv_byte_s[:, 0] * [1, 4, 1], rel=0.02)
    world.paces[1].slow = 1.0
    world.step(16)
    assert world.following.scales == pytest.approx((1, 1, 1), rel=0.02)
