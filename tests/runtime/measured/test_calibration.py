"""Calibration finds what devices take, and leaves them as they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.generate import engine_from_folder, local_devices
from hetis.runtime.measured.calibration import calibrate
from hetis.runtime.measured.coefficients import Coefficients, device_seconds, scaled, with_coefficients
from hetis.runtime.measured.fitting import Call, fit_calls, nonnegative_fit
from hetis.runtime.server.measuring import measure_engine
from tests.runtime.checkpoints import random_model
from tests.runtime.measured.paced import FakeClock, Pace, PacedDevice, paced_devices

PACES = (
    Pace(head_s=2e-6, kv_byte_s=3e-9, call_s=4e-5),
    Pace(head_s=1e-5, kv_byte_s=1e-8, call_s=7e-5, read_s=1e-6),
)


def engine_of(paces: tuple[Pace, ...], clock: FakeClock, *, pages: int = 1000) -> Engine:
    return engine_from_folder(random_model().folder, paced_devices(paces, clock, pages=pages))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 10), min_size=3, max_size=3), st.integers(0, 2**16))
def test_the_fit_finds_coefficients_that_are_not_negative(truth: list[float], seed: int) -> None:
    matrix = np.random.default_rng(seed).uniform(0.1, 1, (9, 3))
    assert nonnegative_fit(matrix, matrix @ np.array(truth)) == pytest.approx(truth, abs=1e-6)
    assert (nonnegative_fit(matrix, matrix @ (np.array(truth) - 5)) >= 0).all()


def test_calls_are_fitted_by_their_relative_errors_and_none_give_nothing() -> None:
    calls = [Call(heads=h, kv_bytes=g, seconds=2e-6 * h + 5e-10 * g + 1e-5) for h in (1, 8) for g in (1e3, 1e6, 1e8)]
    assert fit_calls(calls) == pytest.approx((2e-6, 5e-10, 1e-5))
    assert fit_calls([]) == (0.0, 0.0, 0.0)


def test_dispatch_goes_by_what_the_devices_take() -> None:
    clock = FakeClock()
    engine = engine_of(PACES, clock)
    measured = measure_engine(engine, clock=clock, pause=clock.pause)
    costs = engine.placement.state.stage
    assert costs is engine.placement.costs
    assert measured.predictor is not None
    assert measured.predictor.costs is costs
    for i, pace in enumerate(PACES):
        # What another device takes beyond its pace is that its answer is read.
        assert costs.head_s[i, 0] == pytest.approx(pace.head_s, rel=1e-3)
        assert costs.kv_byte_s[i, 0] == pytest.approx(pace.kv_byte_s, rel=1e-3)
        assert costs.call_s[i, 0] + costs.transfer_s[i] == pytest.approx(pace.call_s + pace.read_s, rel=1e-3)
    assert measured.following[0].scales == (1.0, 1.0)
    assert not engine.has_work
    assert list(engine.placement.state.free_blocks()) == [1000, 1000]
    assert all(device.pool.free_pages == 1000 for device in engine.stage.devices)  # type: ignore[attr-defined]


def test_an_answer_that_is_there_already_takes_what_reading_it_takes() -> None:
    clock = FakeClock()
    engine = engine_of(PACES, clock)
    found = calibrate(engine.stage.devices, groups=4, exchange_bytes_per_head=96.0, clock=clock, pause=clock.pause)
    assert [found[name].read_s for name in ("d0", "d1")] == pytest.approx([0.0, 1e-6])


def test_the_exchange_is_told_apart_by_copies_and_the_sum_stays() -> None:
    """A device whose copies take 1e-8 s per byte and 2e-5 s each: so do its exchanges, of what calls take in all."""
    clock = FakeClock()
    engine = engine_of(PACES, clock)
    away = engine.stage.devices[1]
    assert isinstance(away, PacedDevice)
    export = away.export

    def slow_export(request, incarnation, heads, first, last):  # type: ignore[no-untyped-def]
        k, v = export(request, incarnation, heads, first, last)
        clock.pause(2e-5 + 1e-8 * (k.numel() + v.numel()) * k.element_size())
        return k, v

    away.export = slow_export  # type: ignore[method-assign]
    found = calibrate(engine.stage.devices, groups=4, exchange_bytes_per_head=96.0, clock=clock, pause=clock.pause)
    coefficients, pace = found["d1"].coefficients, PACES[1]
    assert found["d1"].copy_byte_s == pytest.approx(1e-8)
    assert coefficients.transfer_byte_s == pytest.approx(1e-8)
    assert coefficients.transfer_s == pytest.approx(2e-5)
    assert coefficients.pieces[0][0] + 96 * coefficients.transfer_byte_s == pytest.approx(pace.head_s, rel=1e-3)
    assert coefficients.pieces[0][2] + coefficients.transfer_s == pytest.approx(pace.call_s + pace.read_s, rel=1e-3)
    assert found["d0"].coefficients.transfer_s == 0.0


def test_a_device_without_room_to_be_measured_keeps_the_first_guess() -> None:
    clock = FakeClock()
    engine = engine_of(PACES, clock, pages=0)
    guess = {"d1": Coefficients(pieces=((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), transfer_byte_s=7.0, transfer_s=8.0)}
    even = engine.placement.costs
    measure_engine(engine, planned=guess, clock=clock, pause=clock.pause)
    costs = engine.placement.costs
    assert costs.head_s.tolist() == [[even.head_s[0, 0]] * 2, [1.0, 4.0]]
    assert (costs.transfer_byte_s[1], costs.transfer_s[1]) == (7.0, 8.0)


def test_scales_count_for_all_that_a_device_takes() -> None:
    engine = engine_from_folder(random_model().folder, local_devices([50, 50]))
    known = {"local1": Coefficients(pieces=((1.0, 2.0, 3.0),), transfer_byte_s=0.5, transfer_s=4.0)}
    costs = with_coefficients(engine.placement.costs, known)
    heads, kv_bytes = np.array([2.0, 2.0]), np.array([10.0, 10.0])
    before = device_seconds(costs, heads, kv_bytes)
    exchange = costs.heads.exchange_bytes_per_head
    assert before[1] == pytest.approx(2 + 20 + 3 + 0.5 * exchange * 2 + 4)
    after = device_seconds(scaled(costs, np.array([1.0, 3.0])), heads, kv_bytes)
    assert after == pytest.approx(before * [1, 3])
    assert device_seconds(costs, np.array([2.0, 0.0]), kv_bytes)[1] == 0.0
